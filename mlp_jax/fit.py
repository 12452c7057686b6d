"""The one epoch loop: trains a fleet of runs of one Config; a single run is a fleet of one.

A program is compiled once for a Config, a placement and a size, whatever the seeds, the learning
rates and the epoch.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter as clock
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlp_jax.config import STREAMS, Config, UserError
from mlp_jax.data import Dataset, Split
from mlp_jax.model import N_PIXELS
from mlp_jax.parallel import Placement, from_groups, map_runs, replicate, to_groups
from mlp_jax.step import (
    EVAL_BATCH,
    TrainState,
    evaluate,
    init_state,
    run_keys,
    train_epoch,
)


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
    """History [runs, epochs] each, uint8 predictions [runs, n_test] and, still on the devices, the
    state: see `parallel.from_groups`."""

    state: TrainState
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

    n_groups = np.int32(n_groups)
    _, state = programs.init(n_groups, (), fleet, ())
    history, train_seconds = [], 0.0
    for epoch in range(config.epochs):
        start = clock()
        shared = (*data, np.int32(epoch))
        state, (metrics, predictions) = programs.epoch(n_groups, state, fleet, shared)
        metrics = from_groups(metrics, n_runs)  # waits for the epoch
        seconds = clock() - start
        train_seconds += seconds
        history.append(metrics)
        on_epoch(epoch + 1, metrics, seconds)
    return FitResult(
        state=state,
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
    """Compile ahead of time for arguments of these shapes; states are donated."""

    def init(_, run: Runs, shared):
        return (), init_state(run_keys(run.seeds), run.learning_rate, config=config)

    def epoch(state, run: Runs, shared):
        train, test, epoch = shared
        state, metrics = train_epoch(state, train, run_keys(run.seeds), epoch, config=config)
        result = evaluate(state.params, test, config=config)
        means = EpochMetrics(metrics.loss, result.loss, result.correct)
        return state, (means, result.predictions)

    start = clock()
    count = jax.ShapeDtypeStruct((), np.int32)
    init, epoch = (jax.jit(map_runs(fn, placement), donate_argnums=1) for fn in (init, epoch))
    init = init.lower(count, (), fleet, ())
    epoch = epoch.lower(count, init.out_info[1], fleet, (*data, count))
    # without it XLA's CPU backend copies two of the kernels in every step
    in_place = {"xla_cpu_copy_insertion_use_region_analysis": True}
    options = in_place if placement.devices[0].platform == "cpu" else {}
    with ThreadPoolExecutor(max_workers=1) as beside:
        # it runs once, for milliseconds, and would take a second to optimise
        quick = beside.submit(init.compile, {"xla_backend_optimization_level": 0})
        return Programs(epoch=epoch.compile(options), init=quick.result(), seconds=clock() - start)


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of a run's state."""
    seeds = jax.ShapeDtypeStruct((len(STREAMS),), np.uint32)
    return jax.eval_shape(
        lambda seeds: init_state(run_keys(seeds), jnp.float32(0), config=config), seeds
    )


def run_bytes(config: Config) -> int:
    """Device memory that a run takes while it trains, roughly: what a lane costs."""
    n_state = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(config)))
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
