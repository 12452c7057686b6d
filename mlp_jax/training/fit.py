"""The one epoch loop: trains many runs of one Config, or one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.arrays import Dataset, count_steps, for_dataset
from mlp_jax.training.config import Config
from mlp_jax.training.parallel import Placement, from_groups, place, to_groups
from mlp_jax.training.programs import Programs, current_programs, run_bytes
from mlp_jax.training.run import Run, make_run
from mlp_jax.training.step import TrainState, count_examples, eval_params


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
        return from_groups([jax.vmap(eval_params)(state) for state in self.states], len(self.runs))

    def snapshot(self) -> "Progress":
        """A copy from which any devices can resume: one group of NumPy arrays [runs, ...]."""
        return self._replace(states=[from_groups(self.states, len(self.runs))])


def fit(
    config: Config,
    dataset: Dataset,
    runs: Sequence[Run] | None = None,
    *,
    seeds: Iterable[int] | None = None,
    placement: Placement | None = None,
    start: Progress | None = None,
    programs: Programs | None = None,
) -> Iterator[Progress]:
    """Train `runs`, or one run per seed (default: 0), yielding all of them after each epoch.

    The whole test set is evaluated after each epoch. To stop, leave the loop; to resume, pass the
    `Progress.snapshot()` of the same runs as `start`. `placement` defaults to all local devices: on
    CPU one, whatever its cores, unless `use_cores` was called before JAX started. The learning
    rates are those of `runs`. `programs` may be given if they are compiled already. UserError if
    the Config does not fit the data set, or `start` is of other runs, settings or data.
    """
    config = for_dataset(config, dataset)
    if runs is not None and seeds is not None:
        raise UserError("fit takes runs or seeds, not both")
    if runs is None:
        seeds = [0] if seeds is None else seeds
        runs = [make_run(seed, config.learning_rate) for seed in seeds]
    runs = [make_run(run.seed, run.learning_rate, run.vary) for run in runs]  # checks them
    if not runs:
        raise UserError("fit needs at least one run")
    if start:
        _check_start(start, config, dataset, runs)
    placement = placement or place(len(runs), run_bytes(config))
    programs = programs or current_programs(config, placement, dataset.arrays)
    return _epochs(config, dataset, tuple(runs), placement, start, programs)


def _check_start(start: Progress, config: Config, dataset: Dataset, runs: Sequence[Run]) -> None:
    if start.runs != tuple(runs):
        raise UserError("the snapshot to start from belongs to other runs")
    for name, now in vars(config).items():
        if name != "learning_rate" and (before := getattr(start.config, name)) != now:
            raise UserError(f"the snapshot to start from has {name}={before}, not {now}")
    if start.fingerprint != dataset.fingerprint:
        raise UserError("the snapshot to start from was trained on different data")


def _epochs(
    config: Config,
    dataset: Dataset,
    runs: tuple[Run, ...],
    placement: Placement,
    start: Progress | None,
    programs: Programs,
) -> Iterator[Progress]:
    data = jax.device_put(dataset.arrays, placement.replicated)
    seeds = np.array([run.seeds for run in runs], np.uint32)
    rates = np.array([run.learning_rate for run in runs], np.float32)
    groups = to_groups((seeds, rates), placement)
    if start:
        begin, history = start.epoch, start.history
        states = to_groups(start.snapshot().states[0], placement)
    else:
        begin, history = 0, {}
        states = [programs.init((), group, ())[0] for group in groups]
    n_examples = count_examples(len(dataset.train.labels), config=config)
    n_steps = np.int32(count_steps(config, n_examples))
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
