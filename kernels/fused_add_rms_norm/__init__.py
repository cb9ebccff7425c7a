"""fused_add_rms_norm: the op's declaration and its kernels."""
