"""Numerical operations on residuals and SAE weights. Imports torch alone; the meaning of each is in `reference`."""
