"""Benchmarks that compare hdispatch with floors and peers in one run; `hdispatch bench` is their command line."""
