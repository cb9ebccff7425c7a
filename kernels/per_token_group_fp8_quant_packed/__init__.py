"""per_token_group_fp8_quant_packed: the op's declaration and its kernels."""
