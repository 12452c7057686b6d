"""The training loss: every term is here and nowhere else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlp_jax.training.config import Config
from mlp_jax.training.model import MLP
from mlp_jax.training.run import Streams


class Batch(NamedTuple):
    """Examples of a step; `mask` is 0 for the padding of a smaller last batch, else 1."""

    pixels: jax.Array  # float32 [batch, 784], in [0, 1]
    labels: jax.Array  # int32 [batch], or a teacher's probabilities [batch, classes]
    mask: jax.Array  # float32 [batch]


def loss_fn(
    params: dict, batch: Batch, keys: Streams, *, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that is differentiated, and metrics: means over the examples that `mask` keeps.

    `keys` are those of the step. Metrics are averaged over an epoch's examples and stored with the
    prefix `train_`.
    """

    def apply(pixels: jax.Array) -> Any:
        rngs = {"dropout": keys.dropout}
        return MLP(config).apply({"params": params}, pixels, train=True, rngs=rngs)

    # distinct from dropout's own keys, which fold in hashes of paths
    noise_key, mixup_key, vat_key = (jax.random.fold_in(keys.dropout, i) for i in range(3))
    pixels, targets = batch.pixels, batch.labels
    if config.mixup:
        pixels, targets = mix(pixels, targets, batch.mask, mixup_key, config=config)
    if config.input_noise:
        pixels += config.input_noise * jax.random.normal(noise_key, pixels.shape)
    logits = apply(pixels)
    losses = example_losses(logits, targets, config=config)
    if config.vat:
        losses += virtual_adversarial_losses(apply, pixels, logits, vat_key, radius=config.vat)
    loss = jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)
    return loss, {"loss": loss}


def example_losses(logits: jax.Array, targets: jax.Array, *, config: Config) -> jax.Array:
    """Losses [...] of logits [..., classes]; `targets` are classes [...], or probabilities."""
    are_classes = targets.ndim < logits.ndim
    probabilities = jax.nn.one_hot(targets, config.n_classes) if are_classes else targets
    probabilities = optax.smooth_labels(probabilities, config.label_smoothing)
    if config.loss == "squared-hinge":
        signs = 2 * probabilities - 1
        return jnp.sum(jnp.maximum(0, 1 - signs * logits) ** 2, axis=-1)
    if are_classes and not config.label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.softmax_cross_entropy(logits, probabilities)


def mix(
    pixels: jax.Array, labels: jax.Array, mask: jax.Array, key: jax.Array, *, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Each example mixed with another of the batch, in one ratio for all, and likewise its target.

    arXiv 1710.09412; the padding of a smaller last batch is mixed with nothing.
    """
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, config.mixup, config.mixup)
    partners = jax.random.permutation(order_key, len(labels))
    shares = jnp.where(mask[partners] > 0, share, 1.0)[:, None]
    targets = labels if labels.ndim > 1 else jax.nn.one_hot(labels, config.n_classes)
    mixed = [shares * each + (1 - shares) * each[partners] for each in (pixels, targets)]
    return mixed[0], mixed[1]


def virtual_adversarial_losses(
    apply: Callable, pixels: jax.Array, logits: jax.Array, key: jax.Array, *, radius: float
) -> jax.Array:
    """How far a step of length `radius` can move each prediction: KL divergences [batch].

    The direction is found by one power iteration from a random one, as in arXiv 1704.03976.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits))

    def divergences(direction):
        moved = jax.nn.log_softmax(apply(pixels + direction))
        return optax.losses.kl_divergence_with_log_targets(moved, log_p)

    start = _unit(jax.random.normal(key, pixels.shape))
    # small enough for the second-order expansion, and large enough for float32
    direction = jax.grad(lambda d: jnp.sum(divergences(0.1 * d)))(start)
    return divergences(radius * _unit(jax.lax.stop_gradient(direction)))


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
