"""A package of one op whose host function takes helpers from beside the op."""
