"""ll_gemm_fp8: the op's declaration and its kernels."""
