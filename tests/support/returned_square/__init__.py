"""An op that returns one tensor."""
