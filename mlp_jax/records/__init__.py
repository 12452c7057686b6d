"""What a run leaves behind: rows, checkpoints, weights, and where they came from."""
