"""The one epoch loop: trains a fleet of runs of one Config; a single run is a fleet of one.

A program is compiled once for a Config, a placement and a size, whatever the seeds, the learning
rates and the epoch.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mlp_jax.config import STREAMS, Config, UserError
from mlp_jax.data import Dataset, Split
from mlp_jax.model import N_PIXELS
from mlp_jax.parallel import Placement, from_groups, map_runs, replicate, to_groups
from mlp_jax.step import EVAL_BATCH, evaluate, init_state, run_keys, train_epoch


class Runs(NamedTuple):
    """What tells the runs of a fleet apart: uint32 [runs, streams] and float32 [runs]."""

    seeds: np.ndarray
    learning_rate: np.ndarray


class EpochMetrics(NamedTuple):
    """Means over the training set while it trained and over the test set after; [runs] each."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    test_correct: np.ndarray


class FitResult(NamedTuple):
    """Leading axis of runs everywhere; the history's arrays are [runs, epochs]."""

    params: dict
    history: EpochMetrics
    predictions: np.ndarray
    train_seconds: float
    compile_seconds: float


class Programs(NamedTuple):
    init: Callable
    epoch: Callable
    seconds: float


def make_runs(seeds: list[tuple[int, ...]], learning_rates: list[float]) -> Runs:
    """A fleet from the stream seeds (config.stream_seeds) and the learning rate of each run."""
    return Runs(np.array(seeds, np.uint32), np.array(learning_rates, np.float32))


def fit(
    config: Config,
    dataset: Dataset,
    runs: Runs,
    *,
    placement: Placement,
    size: int | None = None,
    on_epoch: Callable[[int, EpochMetrics, float], None] = lambda epoch, metrics, seconds: None,
) -> FitResult:
    """Train `runs` for `config.epochs` epochs, scoring the test set after each.

    `size` is the number of runs to compile for, where fleets of several sizes share a program.
    The learning rate is taken from `runs`, not from `config`. `on_epoch(epoch, metrics, seconds)`
    is called after each epoch, counted from 1; what it raises ends the training.
    """
    n_runs = len(runs.learning_rate)
    n_groups = -(-n_runs // placement.width)
    fleet = to_groups(runs, max(n_groups, -(-(size or 0) // placement.width)), placement)
    data = replicate((dataset.train, dataset.test), placement)
    programs = compile_programs(static(config), placement, abstract(fleet), abstract(data))

    state = programs.init(np.int32(n_groups), fleet, ())
    history, train_seconds = [], 0.0
    for epoch in range(config.epochs):
        start = time.perf_counter()
        shared = (*data, np.int32(epoch))
        state, metrics, predictions = programs.epoch(np.int32(n_groups), state, fleet, shared)
        metrics = from_groups(metrics, n_runs)  # waits for the epoch
        seconds = time.perf_counter() - start
        train_seconds += seconds
        history.append(metrics)
        on_epoch(epoch + 1, metrics, seconds)
    return FitResult(
        params=from_groups(state.params, n_runs),
        history=EpochMetrics(*(np.stack(leaves, axis=1) for leaves in zip(*history, strict=True))),
        predictions=from_groups(predictions, n_runs),
        train_seconds=train_seconds,
        compile_seconds=programs.seconds,
    )


def static(config: Config) -> Config:
    """What of `config` shapes a compiled program: neither rate, nor epochs, nor the data's name."""
    return dataclasses.replace(config, learning_rate=1.0, epochs=1, dataset="")


def abstract(tree):
    """What a compiled program knows of a nested tuple of arrays; hashable."""

    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, tree)


@functools.lru_cache(maxsize=8)
def compile_programs(
    config: Config, placement: Placement, fleet: Runs, data: tuple[Split, Split]
) -> Programs:
    """Compile ahead of time for arguments of these shapes; the state is donated."""

    def init(run: Runs, _):
        return init_state(run_keys(run.seeds), run.learning_rate, config=config)

    def epoch(state, run: Runs, shared):
        train, test, epoch = shared
        state, metrics = train_epoch(state, train, run_keys(run.seeds), epoch, config=config)
        result = evaluate(state.params, test, config=config)
        means = EpochMetrics(metrics.loss, result.loss, result.correct)
        return state, means, result.predictions

    count = jax.ShapeDtypeStruct((), np.int32)
    start = time.perf_counter()
    compiled_init = jax.jit(map_runs(init, placement)).lower(count, fleet, ()).compile()
    mapped = jax.jit(map_runs(epoch, placement), donate_argnums=1)
    compiled_epoch = mapped.lower(count, compiled_init.out_info, fleet, (*data, count)).compile()
    return Programs(compiled_init, compiled_epoch, time.perf_counter() - start)


def run_bytes(config: Config) -> int:
    """Device memory that a run takes while it trains, roughly: what a lane costs."""
    state = jax.eval_shape(
        lambda seeds: init_state(run_keys(seeds), 1.0, config=config),
        jax.ShapeDtypeStruct((len(STREAMS),), np.uint32),
    )
    n_state = sum(leaf.size for leaf in jax.tree.leaves(state))
    # donated state, gradients and updates; hidden activations of the test batch and their ReLU
    n_activations = 2 * EVAL_BATCH * (N_PIXELS + sum(config.hidden))
    return 4 * (3 * n_state + n_activations)


def check_fits(config: Config, dataset: Dataset) -> Config:
    """`config` with the data set's number of classes; UserError where the two do not fit."""
    n_train = len(dataset.train.labels)
    if config.batch_size > n_train:
        raise UserError(
            f"batch size {config.batch_size} is larger than the {n_train} training examples"
            f" of {config.dataset}"
        )
    return dataclasses.replace(config, n_classes=dataset.n_classes)
