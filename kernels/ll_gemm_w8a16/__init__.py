"""ll_gemm_w8a16: the op's declaration and its kernels."""
