"""rotary_embedding: the op's declaration and its kernels."""
