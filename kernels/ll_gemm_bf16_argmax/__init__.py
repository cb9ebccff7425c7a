"""ll_gemm_bf16_argmax: the op's declaration and its kernels."""
