"""Where the rest of the sequence is, and how to reach it."""
