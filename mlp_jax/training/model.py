"""The network: Dense, ReLU and Dropout for each hidden width, then Dense to the logits.

A layer's name decides its initial weights (Linen hashes the path into the key), so the names
given here are part of every recorded number.
"""

import functools

import flax.linen as nn
import jax
from jax import lax

from mlp_jax.training.config import Config

N_PIXELS = 28 * 28


class MLP(nn.Module):
    """Fully connected classifier; glorot-uniform kernels and zero biases, as in Keras."""

    hidden: tuple[int, ...]
    dropout: float
    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [..., n_classes] of float32 pixels [..., 784]; `train` needs a "dropout" rng."""
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"hidden_{i}")(x))
            x = nn.Dropout(self.dropout, name=f"dropout_{i}")(x, deterministic=not train)
        return dense(self.n_classes, name="output", dot_general=narrow_product)(x)


dense = functools.partial(nn.Dense, kernel_init=nn.initializers.glorot_uniform())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def narrow_product(x: jax.Array, w: jax.Array, dimensions, precision=None) -> jax.Array:
    """`x @ w`, as the `dot_general` of a Dense layer with few outputs.

    `dimensions` and `precision` are the defaults there: last axis with first, JAX's own setting.
    """
    return x @ w


def _forward(x, w, dimensions, precision):
    return x @ w, (x, w)


def _backward(dimensions, precision, residuals, d):
    x, w = residuals
    # On CPU XLA takes 10 times longer for x.T @ d, a [512, 10] product, than for its transpose,
    # and the barrier keeps it from turning one into the other. The sums are the same.
    return d @ w.T, lax.optimization_barrier(d.T @ x).T


narrow_product.defvjp(_forward, _backward)


def make_model(config: Config) -> MLP:
    return MLP(config.hidden, config.dropout, config.n_classes)


def describe(config: Config, params) -> str:
    """A table of layers, output shapes and parameters; `params` are one run's, or their shapes."""
    counts = {layer: count_parameters(leaves) for layer, leaves in params.items()}
    rows = [("layer", "output shape", "parameters")]
    for i, width in enumerate(config.hidden):
        rows += [(f"hidden_{i} (Dense, ReLU)", f"(batch, {width})", f"{counts[f'hidden_{i}']:,}")]
        rows += [(f"dropout_{i} ({config.dropout:g})", f"(batch, {width})", "0")]
    rows += [("output (Dense)", f"(batch, {config.n_classes})", f"{counts['output']:,}")]
    total = sum(counts.values())
    # 4 bytes a float32 parameter
    rows += [("total", f"{total * 4 / 2**20:.2f} MiB", f"{total:,}")]
    return "\n".join(f"{layer:<26}{shape:<16}{count:>12}" for layer, shape, count in rows)


def count_parameters(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
