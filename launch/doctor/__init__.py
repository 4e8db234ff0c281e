"""The checks of `longreach doctor`, and what they measure."""
