"""fused_qk_norm_rope: the op's declaration and its kernels."""
