"""attention_half: the op's declaration and its kernels."""
