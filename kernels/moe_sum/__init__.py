"""moe_sum: the op's declaration and its kernels."""
