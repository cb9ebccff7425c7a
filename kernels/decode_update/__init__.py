"""decode_update: the op's declaration and its kernels."""
