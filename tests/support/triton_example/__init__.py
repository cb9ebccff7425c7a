"""An op whose kernel is plain Triton with a Python host function: what a user's own op outside of hdispatch looks like."""
