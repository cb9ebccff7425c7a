"""rms_norm_per_block_quant: the op's declaration and its kernels."""
