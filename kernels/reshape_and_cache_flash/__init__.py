"""reshape_and_cache_flash: the op's declaration and its kernels."""
