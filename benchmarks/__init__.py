"""Benchmarks of this checkout: programs to run by path, and the two behind `hdispatch bench ops` and `hdispatch bench pdl`."""
