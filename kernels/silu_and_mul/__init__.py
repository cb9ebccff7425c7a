"""silu_and_mul: the op's declaration and its kernels."""
