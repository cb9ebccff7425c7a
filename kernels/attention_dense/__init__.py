"""attention_dense: the op's declaration and its kernel."""
