"""From texts to sparse features: running a model and encoding its residuals."""
