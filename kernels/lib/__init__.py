"""What kernels of several ops share; no package here is an op."""
