"""An op with two ladders, whose config files test_ladders.py writes."""
