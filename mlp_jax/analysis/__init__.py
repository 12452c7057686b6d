"""Statistics of finished runs: NumPy in, numbers and figures out."""
