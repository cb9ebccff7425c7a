"""Kernels of the ops, one package per op."""
