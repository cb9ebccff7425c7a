"""dynamic_scaled_fp8_quant: the op's declaration and its kernels."""
