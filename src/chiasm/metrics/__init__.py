"""Arrays to numbers with intervals; NumPy only."""
