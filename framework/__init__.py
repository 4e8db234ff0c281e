"""Models, data and training."""
