"""The one epoch loop: trains many runs of one Config, or one.

A program is compiled once per Config and placement, whatever the runs, their number, their rates
and the epochs.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.arrays import N_PIXELS, Dataset, count_steps, for_dataset
from mlp_jax.training.config import Config
from mlp_jax.training.parallel import (
    COMPILER_OPTIONS,
    Placement,
    RunBytes,
    from_groups,
    map_runs,
    numerics,
    place,
    to_groups,
)
from mlp_jax.training.run import STREAMS, Run, make_run
from mlp_jax.training.step import (
    EVAL_BATCH,
    TrainState,
    eval_params,
    evaluate,
    init_state,
    run_keys,
    train_epoch,
)


class Snapshot(NamedTuple):
    """All that training needs to resume, as NumPy arrays, whatever devices it ran on."""

    config: Config
    runs: tuple[Run, ...]
    epoch: int
    state: TrainState  # leaves [runs, ...]
    history: dict[str, np.ndarray]  # by metric, [runs, epoch]
    predictions: np.ndarray  # uint8 [runs, n_test]
    fingerprint: str  # of the data set


class Progress(NamedTuple):
    """Training after `epoch` epochs: NumPy arrays, except the states, on the devices.

    The states are donated to the next epoch, so they are gone once the generator advances.
    """

    config: Config
    runs: tuple[Run, ...]
    epoch: int
    history: dict[str, np.ndarray]  # by metric (train_loss, test_correct, ...), [runs, epoch]
    predictions: np.ndarray  # classes predicted for the test images, uint8 [runs, n_test]
    states: list[TrainState]  # of groups of runs
    fingerprint: str  # of the data set

    @property
    def test_accuracy(self) -> np.ndarray:
        """Fraction of test images that each run gets right, [runs]."""
        return self.history["test_correct"][:, -1] / self.predictions.shape[1]

    def fetch_params(self) -> dict:
        """A copy of the weights to predict with, NumPy arrays [runs, ...]."""
        return from_groups([eval_params(state) for state in self.states], len(self.runs))

    def snapshot(self) -> Snapshot:
        state = from_groups(self.states, len(self.runs))
        kept = (self.epoch, state, self.history, self.predictions, self.fingerprint)
        return Snapshot(self.config, self.runs, *kept)


def fit(
    config: Config,
    dataset: Dataset,
    runs: Sequence[Run] | None = None,
    *,
    seeds: Iterable[int] = (0,),
    placement: Placement | None = None,
    start: Snapshot | None = None,
    programs: "Programs | None" = None,
) -> Iterator[Progress]:
    """Train `runs`, or one run per seed, yielding all of them after each epoch.

    The whole test set is evaluated after each epoch. To stop, leave the loop; to resume, pass the
    `Progress.snapshot()` of the same runs as `start`. `placement` defaults to all local devices.
    The learning rates are those of `runs`. `programs` may be given if they are compiled already.
    UserError if the Config does not fit the data set, or `start` is of other runs, settings or
    data.
    """
    config = for_dataset(config, dataset)
    if runs is None:
        runs = [make_run(seed, config.learning_rate) for seed in seeds]
    if not runs:
        raise UserError("fit needs at least one run")
    if start and start.runs != tuple(runs):
        raise UserError("the snapshot to start from belongs to other runs")
    if start and _without_length(start.config) != _without_length(config):
        raise UserError("the snapshot to start from was trained with different settings")
    if start and start.fingerprint != dataset.fingerprint:
        raise UserError("the snapshot to start from was trained on different data")
    if start and start.epoch > start.config.epochs != config.epochs:
        raise UserError(f"a training of {start.config.epochs} epochs cannot be extended")
    placement = placement or place(len(runs), run_bytes(config))
    programs = programs or current_programs(config, placement, dataset.arrays)
    return _epochs(config, dataset, tuple(runs), placement, start, programs)


def _without_length(config: Config) -> Config:
    """`config` without what may change: the rate and, if no schedule reads it, the length."""
    fixed: dict[str, Any] = {"learning_rate": 1.0}
    if config.schedule == "constant" and not config.warmup:
        fixed["epochs"] = 1
    return replace(config, **fixed)


def _epochs(
    config: Config,
    dataset: Dataset,
    runs: tuple[Run, ...],
    placement: Placement,
    start: Snapshot | None,
    programs: "Programs",
) -> Iterator[Progress]:
    data = jax.device_put(dataset.arrays, placement.replicated)
    seeds = np.array([run.seeds for run in runs], np.uint32)
    rates = np.array([run.learning_rate for run in runs], np.float32)
    groups = to_groups((seeds, rates), placement)
    if start:
        begin, history = start.epoch, start.history
        states = to_groups(start.state, placement)
    else:
        begin, history = 0, {}
        states = [programs.init((), group, ())[0] for group in groups]
    n_steps = np.int32(count_steps(config, len(dataset.train.labels)))
    for epoch in range(begin, config.n_epochs):
        results = []
        for i, group in enumerate(groups):
            shared = (*data, np.int32(epoch), n_steps)
            states[i], result = programs.epoch(states[i], group, shared)
            # one group at a time: several at once would share the cores and their caches
            results.append(jax.device_get(result))
        metrics, predictions = from_groups(results, len(runs))
        columns = {name: values[:, None] for name, values in metrics.items()}
        if start and (changed := history.keys() ^ columns.keys()):
            raise UserError(f"the snapshot to start from has other metrics: {min(changed)}")
        history = {
            name: np.concatenate([history[name], new], axis=1) if history else new
            for name, new in columns.items()
        }
        for values in history.values():
            values.flags.writeable = False  # a part of what later epochs yield
        reached = (epoch + 1, history, predictions, list(states))
        yield Progress(config, runs, *reached, dataset.fingerprint)


class Programs(NamedTuple):
    """Compiled for one group of runs, with the signature of `parallel.map_runs`."""

    init: Callable
    epoch: Callable
    fingerprint: str  # of the code that was compiled, see `fingerprint_code`


def compile_programs(config: Config, placement: Placement, data: tuple) -> Programs:
    """Compile ahead of time for `Dataset.arrays`, of which only shapes and types matter.

    Configs that differ only in traced values share a program.
    """
    leaves, tree = jax.tree.flatten(_shapes(data, placement.replicated))
    settings = tuple(numerics().values())
    return _compile(program_config(config), placement, tuple(leaves), tree, settings)


def current_programs(config: Config, placement: Placement, data: tuple) -> Programs:
    """As `compile_programs`, but compiled anew if this code was edited since, as in a notebook."""
    compiled = _compile.cache_info().misses
    programs = compile_programs(config, placement, data)
    was_cached = _compile.cache_info().misses == compiled
    if was_cached and programs.fingerprint != fingerprint_code(config, data):
        _compile.cache_clear()
        programs = compile_programs(config, placement, data)
    return programs


def _init(config: Config, _, run, shared):
    """With the signature that `parallel.map_runs` expects, like `_epoch`."""
    seeds, _ = run
    return init_state(run_keys(seeds), config=config), ()


def _epoch(config: Config, state: TrainState, run, shared):
    (seeds, learning_rate), (train, test, teacher, epoch, n_steps) = run, shared
    args = (train, run_keys(seeds), learning_rate, epoch, n_steps)
    state, trained = train_epoch(state, *args, config=config, teacher=teacher)
    tested, predictions = evaluate(eval_params(state), test, config=config)
    metrics = {f"train_{name}": value for name, value in trained.items()}
    metrics |= {f"test_{name}": value for name, value in tested.items()}
    return state, (metrics, predictions)


EPOCHS = (1e-9, 0.3, 0.5, 0.7, 2)
STEPS = [1, 141, 234, 328, 938, 1, 70, 118, 164, 470]
"""Of EPOCHS with all of 60,000 images and with half, when the first fingerprints were stored."""


def program_text(config: Config, data: tuple) -> str:
    """The jaxpr of one run of `config` with its constants, independent of the devices.

    `data` is `Dataset.arrays`, or its shapes.

    It changes with anything in this code that can change a number, but not with comments, names or
    files, nor with rate, epochs or seeds. How JAX compiles it depends on JAX's recorded version.
    The program is given its number of steps, so if these are counted differently that is added.
    """
    if jax.config.values.get("jax_use_simplified_jaxpr_constants"):
        raise UserError("JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS hides constants of the code: unset it")
    array, config = jax.ShapeDtypeStruct, program_config(config)
    run = (array((len(STREAMS),), np.uint32), array((), np.float32))
    shared = (*_shapes(data), array((), np.int32), array((), np.int32))
    init = jax.jit(functools.partial(_init, config)).trace((), run, ())
    epoch = jax.jit(functools.partial(_epoch, config)).trace(init.out_info[0], run, shared)
    constants = [np.asarray(each).tobytes() for part in (init, epoch) for each in part.jaxpr.consts]
    # str(jaxpr) is coloured on a terminal and in a notebook
    init, epoch = (part.jaxpr.pretty_print(use_color=False) for part in (init, epoch))
    every = [
        replace(each, epochs=n) for each in (Config(), Config(examples="half")) for n in EPOCHS
    ]
    steps = [count_steps(each, 60_000) for each in every]
    return f"{init}\n{epoch}\n{constants}" + (f"\n{steps}" if steps != STEPS else "")


def fingerprint_code(config: Config, data: tuple) -> str:
    """The SHA-256 of `program_text`, in hex."""
    return hashlib.sha256(program_text(config, data).encode()).hexdigest()


def _shapes(tree: Any, sharding=None) -> Any:
    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def program_config(config: Config) -> Config:
    """`config` with a fixed value for each setting that the compiled programs do not depend on."""
    fixed: dict[str, Any] = {"learning_rate": 1.0, "epochs": 1}
    return replace(config, **fixed, dataset="", split="test", teacher="")


@functools.lru_cache(maxsize=8)
def _compile(
    config: Config, placement: Placement, leaves: tuple, tree: Any, settings: tuple
) -> Programs:
    """`leaves` and `tree` are the shapes of the data, flattened so that they can be hashed.

    `settings` are JAX's own, which it reads when it traces.
    """
    array: Any = functools.partial(jax.ShapeDtypeStruct, sharding=placement.run_sharding)
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=placement.replicated)
    width, data = placement.width, jax.tree.unflatten(tree, leaves)
    shared = (*data, scalar, scalar)
    runs = (array((width, len(STREAMS)), np.uint32), array((width,), np.float32))
    init_fn, epoch_fn = (
        jax.jit(map_runs(functools.partial(fn, config), placement), donate_argnums=0)
        for fn in (_init, _epoch)
    )
    init = init_fn.lower((), runs, ())
    epoch = epoch_fn.lower(init.out_info[0], runs, shared)
    options = COMPILER_OPTIONS.get(f"epoch, {placement.devices[0].platform}", {})
    with ThreadPoolExecutor(max_workers=2) as beside:
        quick = beside.submit(init.compile, COMPILER_OPTIONS["init"])
        slow = beside.submit(epoch.compile, options)
        fingerprint = fingerprint_code(config, data)  # while XLA compiles
        return Programs(quick.result(), slow.result(), fingerprint)


def state_shapes(config: Config) -> TrainState:
    """Shapes and dtypes of a run's state."""
    seeds = jax.ShapeDtypeStruct((len(STREAMS),), np.uint32)
    return jax.eval_shape(lambda seeds: init_state(run_keys(seeds), config=config), seeds)


def run_bytes(config: Config) -> RunBytes:
    n_state = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(config)))
    # donated state, gradients and updates; hidden activations of the test batch and their ReLU
    n_activations = 2 * EVAL_BATCH * (N_PIXELS + sum(config.hidden))
    return RunBytes(4 * n_state, 4 * (3 * n_state + n_activations))
