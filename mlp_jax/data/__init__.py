"""Data sets as arrays, and where their bytes come from."""
