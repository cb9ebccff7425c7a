"""scaled_mm: the op's declaration and its kernels."""
