"""longreach: training on very long sequences, one sequence split over many ranks."""

__version__ = "0.1.0"
