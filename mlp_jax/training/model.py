"""The network: Dense, ReLU and Dropout for each hidden width, then Dense to the logits.

A layer's name decides its initial weights (Linen hashes the path into the key), so renaming a
layer would change every recorded number.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mlp_jax.training.arrays import N_PIXELS
from mlp_jax.training.config import Config


class MLP(nn.Module):
    """Fully connected classifier."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [..., n_classes] of float32 pixels [..., 784]; `train` needs a "dropout" rng."""
        config = self.config
        product, last_product = PRODUCTS[config.products]
        kernel_init = KERNEL_INITS[config.init]
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, dot_general=product)
        x = nn.Dropout(config.input_dropout, name="input_dropout")(x, deterministic=not train)
        for i, width in enumerate(config.hidden):
            x = dense(width, name=f"hidden_{i}")(x)
            x = ReluDropout(config.dropout, name=f"dropout_{i}")(x, train=train)
        return dense(config.n_classes, name="output", dot_general=last_product)(x)


class ReluDropout(nn.Module):
    """ReLU, then dropout: the same draws as a `flax.linen.Dropout` of the same name."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not (train and self.rate):
            return nn.relu(x)
        keep = 1 - self.rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        # Without the barrier XLA redraws the bits for each of the three products that need them.
        # A NaN passes, as it does in relu.
        on = lax.optimization_barrier(kept & ~(x <= 0))
        return jnp.where(on, x / keep, 0)


KERNEL_INITS = {
    "glorot": nn.initializers.glorot_uniform(),  # Glorot and Bengio 2010
    "he": nn.initializers.he_normal(),  # He et al., arXiv 1502.01852
}


def narrow_product(x: jax.Array, w: jax.Array, dimensions, precision=None) -> jax.Array:
    """`x @ w`, for use as the `dot_general` of a Dense layer with few outputs.

    `dimensions` and `precision` are Dense's defaults: last axis with first, JAX's own setting.
    """
    # On CPU XLA takes 10 times longer for the gradient x.T @ d, a [512, 10] product, than for its
    # transpose. With the transpose of w behind a barrier, it computes the latter.
    return x @ lax.optimization_barrier(w.T).T


def rounded_product(
    x: jax.Array, w: jax.Array, dimensions: lax.DotDimensionNumbers, precision=None
) -> jax.Array:
    """The product of `x` and `w` in bfloat16, with sums in float32, as `lax.dot_general`."""
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


PRODUCTS = {
    # of the hidden layers (None: Linen's own), and of the output layer
    "float32": (None, narrow_product),
    "bfloat16": (rounded_product, rounded_product),
}


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def predict(params: dict, images: Any, *, config: Config) -> jax.Array:
    """Logits [n, classes] of uint8 images [n, 784] or [n, 28, 28].

    Not jitted, so code that was edited in a notebook takes effect.
    Stacked params [runs, ...] are a committee and give [runs, n, classes].
    """
    pixels = to_float(jnp.reshape(images, (-1, N_PIXELS)))

    def logits(params):
        return MLP(config).apply({"params": params}, pixels, train=False)

    is_committee = params["output"]["bias"].ndim > 1
    return jax.vmap(logits)(params) if is_committee else logits(params)


def committee_probabilities(params: dict, pixels: jax.Array, *, config: Config) -> jax.Array:
    """Mean probabilities [n, classes] of a committee, for float32 pixels [n, 784].

    Its params are [members, ...]; its widths may be other than those of `config`.
    """
    hidden = tuple(params[f"hidden_{i}"]["bias"].shape[-1] for i in range(len(params) - 1))
    network = MLP(dataclasses.replace(config, hidden=hidden))

    def probabilities(member: dict) -> jax.Array:
        logits: Any = network.apply({"params": member}, pixels, train=False)
        return jax.nn.softmax(logits)

    # one after another: XLA's CPU backend is slow at products with a batch dimension
    return jnp.mean(lax.map(probabilities, params), axis=0)


def parameter_table(config: Config, params: dict) -> str:
    """Layers, output shapes and parameters; `params` are those of one run, or their shapes."""
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
