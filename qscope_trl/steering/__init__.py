"""Steering: a model's residuals edited along SAE features while it generates."""
