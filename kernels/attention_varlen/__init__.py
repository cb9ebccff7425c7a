"""attention_varlen: the op's declaration and its kernel."""
