"""An op with five sizes, all known per call only."""
