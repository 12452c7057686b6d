"""The one epoch loop: trains a fleet of runs of one Config; a single run is a fleet of one.

A program is compiled once for a Config and a placement, whatever the runs, their number and the
epoch.
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

from mlp_jax.data.dataset import Dataset, Split
from mlp_jax.records.checkpoint import Checkpoints
from mlp_jax.training.config import STREAMS, Config, UserError
from mlp_jax.training.model import N_PIXELS
from mlp_jax.training.parallel import Placement, from_groups, map_runs, replicate, to_groups
from mlp_jax.training.step import (
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


class Progress(NamedTuple):
    """All that a training leaves, and goes on from: NumPy arrays, whatever devices it ran on.

    State [runs, ...], history [runs, epochs] each, uint8 predictions [runs, n_test] after the last
    trained epoch, and the wall time of each epoch [epochs].
    """

    state: TrainState
    history: EpochMetrics
    predictions: np.ndarray
    seconds: np.ndarray


class FitResult(NamedTuple):
    """As Progress, but for the states, which are still on the devices, in groups.

    `epochs` is less than the Config's where the training was stopped.
    """

    epochs: int
    states: list[TrainState]
    history: EpochMetrics
    predictions: np.ndarray
    seconds: np.ndarray
    compile_seconds: float

    @property
    def progress(self) -> Progress:
        state = from_groups(self.states, len(self.predictions))
        return Progress(state, self.history, self.predictions, self.seconds)


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
    on_epoch: Callable[[int, EpochMetrics, float], None] = lambda epoch, metrics, seconds: None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train `runs` for `config.epochs` epochs, scoring the test set after each.

    The learning rate is taken from `runs`, not from `config`. `on_epoch(epoch, metrics, seconds)`
    is called after each epoch, counted from 1; what it raises ends the training, and so does
    `stop()`, asked before each. With `checkpoints` it goes on from the newest, calling `on_epoch`
    for the epochs before too, and saves as it goes, but not at its end.
    """
    n_runs = len(runs.learning_rate)
    groups = to_groups(runs, placement)
    data = replicate((dataset.train, dataset.test), placement)
    programs = compile_programs(static(config), placement, abstract(groups[0]), abstract(data))

    done, progress = 0, empty_progress(config, n_runs, len(dataset.test.labels))
    if checkpoints and (restored := checkpoints.restore(progress)):
        done, progress = restored
        states = to_groups(progress.state, placement)
        for epoch, seconds in enumerate(progress.seconds[:done]):
            on_epoch(epoch + 1, EpochMetrics(*(m[:, epoch] for m in progress.history)), seconds)
    else:
        states = [programs.init((), group, ())[0] for group in groups]
    predictions = progress.predictions

    def result() -> FitResult:
        numbers = (progress.history, predictions, progress.seconds, programs.seconds)
        return FitResult(done, states, *numbers)

    begun = done
    while done < config.epochs and not stop():
        if checkpoints and done > begun and checkpoints.due(done):
            checkpoints.save(done, result().progress)
        start, results = clock(), []
        shared = (*data, np.int32(done))
        for i, group in enumerate(groups):
            states[i], scored = programs.epoch(states[i], group, shared)
            # waited for: groups at the same time would share the cores, and their caches
            results.append(jax.device_get(scored))
        metrics, predictions = from_groups(results, n_runs)
        progress.seconds[done] = clock() - start
        for history, now in zip(progress.history, metrics, strict=True):
            history[:, done] = now
        done += 1
        on_epoch(done, metrics, progress.seconds[done - 1])
    return result()


def empty_progress(config: Config, n_runs: int, n_test: int) -> Progress:
    """The arrays that `fit` fills."""

    def zeros(leaf):
        return np.zeros((n_runs, *leaf.shape), leaf.dtype)

    state = jax.tree.map(zeros, abstract_state(config))
    history = (np.zeros((n_runs, config.epochs), t) for t in (np.float32, np.float32, np.int32))
    predictions, seconds = np.zeros((n_runs, n_test), np.uint8), np.zeros(config.epochs)
    return Progress(state, EpochMetrics(*history), predictions, seconds)


def static(config: Config) -> Config:
    """What of `config` shapes a compiled program: neither rate, nor epochs, nor the data's name."""
    return dataclasses.replace(config, learning_rate=1.0, epochs=1, dataset="")


def abstract(tree):
    """What a compiled program knows of a nested tuple of arrays; hashable."""
    struct = jax.ShapeDtypeStruct
    return jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


@functools.lru_cache(maxsize=8)
def compile_programs(
    config: Config, placement: Placement, group: Runs, data: tuple[Split, Split]
) -> Programs:
    """Compile ahead of time for arguments of these shapes; states are donated."""

    def init(_, run: Runs, shared):
        return init_state(run_keys(run.seeds), run.learning_rate, config=config), ()

    def epoch(state, run: Runs, shared):
        train, test, epoch = shared
        state, metrics = train_epoch(state, train, run_keys(run.seeds), epoch, config=config)
        result = evaluate(state.params, test, config=config)
        means = EpochMetrics(metrics.loss, result.loss, result.correct)
        return state, (means, result.predictions)

    start = clock()
    init, epoch = (jax.jit(map_runs(fn, placement), donate_argnums=0) for fn in (init, epoch))
    init = init.lower((), group, ())
    count = jax.ShapeDtypeStruct((), np.int32)
    epoch = epoch.lower(init.out_info[0], group, (*data, count))
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
