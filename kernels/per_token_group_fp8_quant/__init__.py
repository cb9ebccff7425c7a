"""per_token_group_fp8_quant: the op's declaration and its kernels."""
