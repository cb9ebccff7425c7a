"""Measuring candidates on a GPU: what it reads, how it times, what it writes. Needs neither the build wing nor a DSL."""
