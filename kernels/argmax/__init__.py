"""argmax: the op's declaration and its kernels."""
