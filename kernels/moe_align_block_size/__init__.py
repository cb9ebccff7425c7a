"""moe_align_block_size: the op's declaration and its kernels."""
