"""hdispatch."""
