"""What training minimises. Every term of the loss is here and nowhere else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlp_jax.training.config import Config
from mlp_jax.training.model import make_model, to_float
from mlp_jax.training.run import Streams


class Batch(NamedTuple):
    """Examples of a step; `mask` is 0 for the padding of a smaller last batch, else 1."""

    images: jax.Array  # uint8 [batch, 784]
    labels: jax.Array  # int32 [batch]
    mask: jax.Array  # float32 [batch]


def loss_fn(
    params: dict, batch: Batch, keys: Streams, *, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that is differentiated, and metrics: means over the examples that `mask` keeps.

    `keys` are those of the step. The metrics of an epoch are averaged over its examples and
    stored under their names with `train_` before them.
    """
    rngs = {"dropout": keys.dropout}
    logits = make_model(config).apply(
        {"params": params}, to_float(batch.images), train=True, rngs=rngs
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)
    return loss, {"loss": loss}
