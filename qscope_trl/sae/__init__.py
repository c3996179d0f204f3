"""SAE weights: the frozen module, one loader per checkpoint format, and the lazy suite over layers."""
