"""The low-latency GEMMs, in CuteDSL: few tokens times a matrix of weights, as fast as the weights stream. See program.py."""
