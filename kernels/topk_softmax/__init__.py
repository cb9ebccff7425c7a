"""topk_softmax: the op's declaration and its kernels."""
