"""fused_qk_norm_rope_cache: the op's declaration and its kernels."""
