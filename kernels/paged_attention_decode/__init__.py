"""paged_attention_decode: the op's declaration and its kernels."""
