"""decode_inputs: the op's declaration and its kernels."""
