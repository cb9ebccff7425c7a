"""`hdispatch bench ops`: GPU time per op over the models' shapes, beside torch.compile, vLLM's kernels, CUTLASS and cuBLAS."""
