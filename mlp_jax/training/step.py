"""One run, as pure functions of arrays and a static Config: init, step, epoch, evaluation.

Reads no clock, file or flag. Every random number is drawn from a key folded from absolute numbers
(seed, stream, epoch, step), so what a run draws does not depend on what runs beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlp_jax.data.dataset import Split
from mlp_jax.training.config import STREAMS, Config
from mlp_jax.training.model import N_PIXELS, make_model
from mlp_jax.training.optim import make_optimizer

EVAL_BATCH = 1000
"""Test images scored at once: it bounds the memory of a run that shares a device with many."""


class RunKeys(NamedTuple):
    """Independent random streams of a run; the field order is that of config.STREAMS."""

    init: jax.Array
    order: jax.Array
    dropout: jax.Array


class TrainState(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState


class Batch(NamedTuple):
    """Examples of a step; `real` is 0 for the padding of a smaller last batch, else 1."""

    images: jax.Array
    labels: jax.Array
    real: jax.Array


class TrainMetrics(NamedTuple):
    """Mean loss over the real examples."""

    loss: jax.Array


class EvalMetrics(NamedTuple):
    """Over a whole split: int32 count, mean loss, and the class predicted for each image."""

    correct: jax.Array
    loss: jax.Array
    predictions: jax.Array


def run_keys(seeds: jax.Array) -> RunKeys:
    """Keys from uint32 [3], the seeds of the streams (config.stream_seeds)."""
    assert RunKeys._fields == STREAMS
    return RunKeys(*(jax.random.fold_in(jax.random.key(seeds[i]), i) for i in range(len(STREAMS))))


def init_state(keys: RunKeys, learning_rate: jax.Array, *, config: Config) -> TrainState:
    pixels = jnp.zeros((1, N_PIXELS), jnp.float32)
    params = make_model(config).init(keys.init, pixels, train=False)["params"]
    opt_state = make_optimizer(config, learning_rate).init(params)
    # int32, not a Python 0: a restored step must not retrace
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, *, config: Config
) -> tuple[TrainState, TrainMetrics]:
    """One update on the mean cross-entropy of the batch's real examples.

    `key` is folded with `state.step`, so one key serves the whole run.
    """
    model = make_model(config)
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def mean_loss(params):
        logits = model.apply({"params": params}, to_float(batch.images), train=True, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses * batch.real) / jnp.sum(batch.real)

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), TrainMetrics(loss)


def train_epoch(
    state: TrainState, split: Split, keys: RunKeys, epoch: jax.Array, *, config: Config
) -> tuple[TrainState, TrainMetrics]:
    """Every example once, in an order drawn from (keys.order, epoch); scanned over the steps."""
    indices, real = epoch_order(keys.order, epoch, split.labels.shape[0], config.batch_size)

    def body(state, step):
        rows, real = step
        batch = Batch(split.images[rows], split.labels[rows], real)
        return train_step(state, batch, keys.dropout, config=config)

    state, metrics = lax.scan(body, state, (indices, real))
    # a mean of batch means would count the 96 examples of a last batch as 128
    loss = jnp.sum(metrics.loss * jnp.sum(real, axis=1)) / split.labels.shape[0]
    return state, TrainMetrics(loss)


def epoch_order(
    key: jax.Array, epoch: jax.Array, n_train: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Indices [steps, batch] of an epoch and float32 [steps, batch] that marks the real ones."""
    steps = -(-n_train // batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), n_train)
    order = jnp.pad(order, (0, steps * batch_size - n_train))
    real = (jnp.arange(steps * batch_size) < n_train).astype(jnp.float32)
    return order.reshape(steps, batch_size), real.reshape(steps, batch_size)


def evaluate(params: dict, split: Split, *, config: Config) -> EvalMetrics:
    """Score every image of `split`, without dropout."""
    model = make_model(config)

    def score(example):
        image, label = example
        logits = model.apply({"params": params}, to_float(image), train=False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8), loss

    predictions, losses = lax.map(score, (split.images, split.labels), batch_size=EVAL_BATCH)
    correct = jnp.sum(predictions == split.labels, dtype=jnp.int32)
    return EvalMetrics(correct, jnp.mean(losses), predictions)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255
