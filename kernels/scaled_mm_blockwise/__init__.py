"""scaled_mm_blockwise: the op's declaration and its kernels."""
