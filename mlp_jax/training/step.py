"""One run, as pure functions of arrays and a static Config: init, step, epoch, evaluation.

Every random number comes from a key folded from absolute numbers (seed, stream, epoch or step), so
a run's draws do not depend on the runs beside it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlp_jax.training.arrays import N_PIXELS, Split
from mlp_jax.training.augment import deform_batch
from mlp_jax.training.config import Config
from mlp_jax.training.losses import Batch, example_losses, loss_fn
from mlp_jax.training.model import MLP, committee_probabilities, to_float
from mlp_jax.training.optim import clip_norms, cycle_progress, make_optimizer, schedule
from mlp_jax.training.run import STREAMS, Streams

EVAL_BATCH = 1000
"""Test images evaluated at once, to bound the memory of each of many runs on a device."""

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    mean_params: Any = ()  # moving average of the weights, if that is evaluated


def run_keys(seeds: jax.Array) -> Streams:
    """Keys of a run from uint32 [streams], the seeds of `run.Streams`."""
    return Streams(*(jax.random.fold_in(jax.random.key(seeds[i]), i) for i in range(len(STREAMS))))


def init_state(keys: Streams, *, config: Config) -> TrainState:
    pixels = jnp.zeros((1, N_PIXELS), jnp.float32)
    params = MLP(config).init(keys.init, pixels, train=False)["params"]
    # int32, not a Python 0: a restored step must not retrace
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, params if config.ema else ())


def eval_params(state: TrainState) -> dict:
    """The weights that are evaluated, stored and used for prediction."""
    return state.mean_params or state.params


def train_step(
    state: TrainState,
    batch: Batch,
    keys: Streams,
    learning_rate: jax.Array,
    n_steps: jax.Array,
    *,
    config: Config,
) -> tuple[TrainState, Metrics]:
    """One update; `keys` are the run's, `n_steps` those of the whole training.

    The keys are folded with `state.step`, so one set serves the whole run.
    """
    step_keys = Streams(*(jax.random.fold_in(key, state.step) for key in keys))
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch, step_keys, config=config)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    progress = cycle_progress(state.step, n_steps, config=config)
    rate = learning_rate * schedule(progress, config=config)
    updates = jax.tree.map(lambda update: -rate * update, updates)
    params = optax.apply_updates(state.params, updates)
    if config.max_norm:
        params = clip_norms(params, config)
    mean_params = state.mean_params
    if config.ema:
        # a shorter mean at first, so that the initial weights are soon forgotten
        decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
        mean_params = optax.incremental_update(params, mean_params, 1 - decay)
    return TrainState(state.step + 1, params, opt_state, mean_params), metrics


def train_epoch(
    state: TrainState,
    split: Split,
    keys: Streams,
    learning_rate: jax.Array,
    epoch: jax.Array,
    n_steps: jax.Array,
    *,
    config: Config,
    teacher: Any = (),
) -> tuple[TrainState, Metrics]:
    """Every example once, in an order drawn from (keys.order, epoch); a last epoch may be partial.

    `n_steps` are those of the whole training: where it ends, and the schedule's length. The weights
    of a `teacher`, [members, ...], label the images as they are after deformation.
    """
    examples = example_indices(keys.data, split.labels.shape[0], config=config)
    order, mask = epoch_order(keys.order, epoch, len(examples), config.batch_size)
    indices, steps = examples[order], order.shape[0]
    augment_key = jax.random.fold_in(keys.augment, epoch)

    def one_step(state: TrainState, rows: jax.Array, mask: jax.Array):
        pixels = split.images[rows]
        if config.augments:
            pixels = deform_batch(pixels, rows, augment_key, config=config)
        else:
            pixels = to_float(pixels)
        labels = split.labels[rows]
        if teacher:
            labels = committee_probabilities(teacher, pixels, config=config)
        batch = Batch(pixels, labels, mask)
        return train_step(state, batch, keys, learning_rate, n_steps, config=config)

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]):
        state, metrics = carry
        state, new = one_step(state, indices[i], mask[i])
        return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

    _, shapes = jax.eval_shape(one_step, state, indices[0], mask[0])
    metrics = {name: jnp.zeros(steps, each.dtype) for name, each in shapes.items()}
    taken = jnp.minimum(n_steps - epoch * steps, steps)
    state, metrics = lax.fori_loop(0, taken, body, (state, metrics))
    # a mean of batch means would count the 96 examples of a last batch as 128
    weights = jnp.sum(mask, axis=1) * (jnp.arange(steps) < taken)
    return state, {
        name: jnp.sum(each * weights) / jnp.sum(weights) for name, each in metrics.items()
    }


def example_indices(key: jax.Array, n_train: int, *, config: Config) -> jax.Array:
    """Indices of the examples that a run trains on; `key` is its data stream's."""
    if config.examples == "half":
        return jax.random.permutation(key, n_train)[: n_train // 2]
    if config.examples == "bootstrap":
        return jax.random.randint(key, (n_train,), 0, n_train)
    return jnp.arange(n_train)


def count_examples(n_train: int, *, config: Config) -> int:
    """How many examples `example_indices` gives."""
    indices = jax.eval_shape(lambda: example_indices(jax.random.key(0), n_train, config=config))
    return indices.shape[0]


def epoch_order(
    key: jax.Array, epoch: jax.Array, n_train: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Indices [steps, batch] of an epoch, and float32 [steps, batch]: 0 where they are padding."""
    steps = -(-n_train // batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), n_train)
    order = jnp.pad(order, (0, steps * batch_size - n_train))
    mask = (jnp.arange(steps * batch_size) < n_train).astype(jnp.float32)
    return order.reshape(steps, batch_size), mask.reshape(steps, batch_size)


def evaluate(params: dict, split: Split, *, config: Config) -> tuple[Metrics, jax.Array]:
    """Evaluate all images of `split`, without dropout: metrics, and predicted classes, uint8 [n].

    `correct` is an int32 count; the other metrics are means.
    """
    model, hard = MLP(config), dataclasses.replace(config, label_smoothing=0.0)

    def score(example):
        image, label = example
        logits = model.apply({"params": params}, to_float(image), train=False)
        loss = example_losses(logits, label, config=hard)
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8), loss

    predictions, losses = lax.map(score, (split.images, split.labels), batch_size=EVAL_BATCH)
    correct = jnp.sum(predictions == split.labels, dtype=jnp.int32)
    return {"loss": jnp.mean(losses), "correct": correct}, predictions
