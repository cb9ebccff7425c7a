"""silu_and_mul_per_block_quant: the op's declaration and its kernels."""
