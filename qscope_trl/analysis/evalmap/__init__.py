"""Which evaluation sets measure the same thing, by the features that their samples activate."""
