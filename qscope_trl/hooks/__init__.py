"""Hooks on a model's residual stream: finding decoder layers under any wrapper, capturing their output."""
