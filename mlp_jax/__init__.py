"""Small-network research in JAX: one MLP on MNIST, or hundreds of seeds of it at once."""
