"""rms_norm_dynamic_per_token_quant: the op's declaration and its kernels."""
