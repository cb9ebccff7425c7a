"""`hdispatch bench pdl`: GPU time of chains of dependent small kernels, with programmatic dependent launch and without."""
