"""An op that returns two tensors."""
