"""ll_gemm_bf16: the op's declaration and its kernels."""
