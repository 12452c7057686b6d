"""Checkpoints from which unfinished runs resume, and the weights of finished runs.

Both are .npz files of named arrays. A checkpoint resumes only where the numbers would be the same;
weights may be used on any device and version of JAX.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mlp_jax.errors import UserError
from mlp_jax.files import (
    Damaged,
    expand,
    json_digest,
    load_arrays,
    load_fields,
    log,
    read_or_quarantine,
    save_arrays,
)
from mlp_jax.records.directory import CHECKPOINT_NAME, WEIGHTS_NAME
from mlp_jax.records.provenance import Metadata, check_same, settings
from mlp_jax.records.rows import LOSSES
from mlp_jax.training.arrays import N_PIXELS, Dataset
from mlp_jax.training.config import Config
from mlp_jax.training.fit import Progress
from mlp_jax.training.model import predict as predict_logits
from mlp_jax.training.programs import state_shapes
from mlp_jax.training.run import Run, make_run

SHIPPED = Path(__file__).parents[1] / "weights" / "mnist.npz"
"""The committee shipped with mlp_jax, made by scripts/ship_weights.py."""


def checkpoint_path(directory: Path, runs: Sequence[Run]) -> Path:
    """Where runs that train at the same time are saved."""
    return directory / "checkpoints" / f"{json_digest(runs)[:16]}.npz"


class Checkpoint(NamedTuple):
    path: Path
    epoch: int
    runs: list[Run]
    keep_weights: bool  # once they are finished; they may have rows already


def find_checkpoints(directory: Path) -> list[Checkpoint]:
    """Those in `directory`, most epochs first; by content, as earlier code had other names."""
    found = []
    for path in sorted((directory / "checkpoints").glob("*.npz")):
        if CHECKPOINT_NAME.fullmatch(path.name):
            # one that is damaged is reported if it has the name of runs to be trained
            with contextlib.suppress(Damaged, OSError, KeyError, TypeError):
                fields = load_fields(path)
                runs = [Run(*run) for run in fields["runs"]]
                kept = fields.get("keep_weights", False)
                found.append(Checkpoint(path, fields["epoch"], runs, kept))
    return sorted(found, key=lambda each: -each.epoch)


def save_checkpoint(
    path: Path, snapshot: Progress, seconds: list[float], metadata: Metadata, keep_weights: bool
) -> None:
    """Save a snapshot and the wall time of each epoch, replacing what is at `path`."""
    leaves = jax.tree_util.tree_leaves_with_path(snapshot.states[0])
    arrays = {f"state{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    arrays |= {f"history/{name}": values for name, values in snapshot.history.items()}
    arrays |= {"predictions": snapshot.predictions, "seconds": np.array(seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"epoch": snapshot.epoch, "runs": snapshot.runs, "run": metadata.to_json()}
    save_arrays(path, arrays, fields | {"keep_weights": keep_weights})


def load_checkpoint(
    path: Path, runs: Sequence[Run], metadata: Metadata
) -> tuple[Progress, list[float]] | None:
    """What `save_checkpoint` saved of these runs, and their share of its seconds; None if missing
    or damaged.

    A damaged file is quarantined, and so is one without these runs. UserError if its numbers may
    not be pooled with `metadata`.
    """

    def read(path: Path) -> tuple:
        arrays, fields = load_arrays(path)
        places = {Run(*run): i for i, run in enumerate(fields.get("runs", ()))}
        if not places.keys() >= set(runs):
            raise Damaged(path, "it belongs to other runs")
        return arrays, fields, [places[run] for run in runs], len(runs) / len(places)

    if not (content := read_or_quarantine(read, path)):
        return None
    arrays, fields, places, share = content
    check_same(path, stored := Metadata.from_json(fields["run"], path), metadata)
    if stored.mixed and not metadata.mixed:
        raise UserError(f"{path} was saved with --allow-mixed: resume with it too")
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: f"state{jax.tree_util.keystr(path)}", state_shapes(metadata.config)
    )
    if missing := set(jax.tree.leaves(names)) - arrays.keys():
        raise UserError(f"{path} comes from different training code: it lacks {min(missing)}")
    seconds = (arrays.pop("seconds") * share).tolist()
    arrays = {name: values[places] for name, values in arrays.items()}
    state = jax.tree.map(arrays.__getitem__, names)
    prefix = "history/"
    history = {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}
    kept = (fields["epoch"], history, arrays["predictions"], [state], metadata.fingerprint)
    return Progress(stored.config, tuple(runs), *kept), seconds


class TrainedRun(NamedTuple):
    """A finished run: its settings, weights and final metrics."""

    config: Config
    run: Run
    params: dict  # NumPy arrays by layer and name
    metrics: dict[str, float]  # test_correct, test_loss, train_loss, ... after the last epoch


def weights_path(directory: Path, run: Run) -> Path:
    return directory / "weights" / f"{run.vary}-lr{run.learning_rate:.9g}-seed{run.seed}.npz"


def save_weights(directory: Path, run: Run, params: dict, metrics: dict, metadata: Metadata):
    """One file for a finished run, its arrays named like hidden_0/kernel."""
    path = weights_path(directory, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = run._asdict() | {"metrics": metrics, "run": metadata.to_json()}
    save_arrays(path, traverse_util.flatten_dict(params, sep="/"), fields)


def has_weights(directory: Path, run: Run, metadata: Metadata, row: dict) -> bool:
    """Whether the weights of a run with these settings, data and metrics are there and intact."""
    if not (found := read_or_quarantine(_read_weights, weights_path(directory, run))):
        return False
    trained, origin = found
    shared = {name: value for name, value in trained.metrics.items() if name in row}
    shared.pop("train_loss", None)  # a mean over the epoch, which earlier code rounded otherwise
    same = all(value == row[name] or value != value for name, value in shared.items())  # or nan
    return same and _origin(origin) == _origin(metadata)


def _origin(metadata: Metadata) -> tuple:
    """What the weights of one committee share."""
    return settings(metadata), metadata.fingerprint


def load_run(
    directory: str | Path,
    seed: int | None = None,
    vary: str | None = None,
    learning_rate: float | None = None,
) -> TrainedRun:
    """The run stored in `directory`, or one of a sweep with --keep-weights.

    `seed` chooses among several; so do `vary` and `learning_rate` among several of one seed. Works
    on any device and version of JAX. UserError if there is no such run, or several; Damaged.
    """
    paths = _find_weights(directory)
    if seed is not None:
        paths = [path for path in paths if path.stem.endswith(f"-seed{operator.index(seed)}")]
    if vary is not None:
        paths = [path for path in paths if path.name.startswith(f"{vary}-lr")]
    if learning_rate is not None:
        rate = make_run(0, learning_rate).learning_rate  # as it is stored
        paths = [path for path in paths if f"-lr{rate:.9g}-" in path.name]
    if not paths:
        raise UserError(f"{directory} has no weights of such a run")
    if len(paths) > 1:
        by = "seed" if seed is None else "vary or learning_rate"
        raise UserError(f"{directory} has weights of {len(paths)} such runs: choose one by {by}")
    return _read_weights(paths[0])[0]


def _find_weights(directory: str | Path) -> list[Path]:
    found = sorted((expand(directory) / "weights").glob("*.npz"))
    paths = [path for path in found if WEIGHTS_NAME.fullmatch(path.name)]
    for path in {*found} - {*paths}:
        log.warning("%s is ignored: not a name that mlp_jax gives", path)
    if not paths:
        raise UserError(
            f"{directory} has no weights of a finished run; a sweep needs --keep-weights"
        )
    return paths


def _read_weights(path: Path) -> tuple[TrainedRun, Metadata]:
    arrays, fields = load_arrays(path)
    run = make_run(fields["seed"], fields["learning_rate"], fields["vary"])
    if path.name != weights_path(Path(), run).name:
        raise Damaged(path, f"it holds the weights of seed {run.seed}, family {run.vary}")
    params = traverse_util.unflatten_dict(arrays, sep="/")
    metadata = Metadata.from_json(fields["run"], path)
    # a sweep may have several learning rates
    config = dataclasses.replace(metadata.config, learning_rate=run.learning_rate)
    return TrainedRun(config, run, params, fields["metrics"]), metadata


class Committee(NamedTuple):
    """Finished runs of one Config that vote."""

    config: Config
    runs: tuple[Run, ...]
    params: dict  # NumPy arrays [runs, ...] by layer and name
    metrics: tuple[dict[str, float], ...]  # of each run, as in TrainedRun
    fingerprint: str = ""  # of the data set, if known


def load_committee(directory: str | Path | None = None) -> Committee:
    """All runs whose weights are in `directory`, or in one file like that shipped with mlp_jax,
    which is the default.

    Runs that diverged have no vote; a run that families share has one. UserError if none is left;
    Damaged.
    """
    if directory is None or expand(directory).is_file():
        return _read_committee(expand(directory or SHIPPED))
    stored = {path: _read_weights(path) for path in _find_weights(directory)}
    (first, (_, shared)), *others = stored.items()
    for path, (_, metadata) in others:
        if _origin(metadata) != _origin(shared):
            raise UserError(f"{first} and {path} differ in settings or data: remove one of them")
    if any(metadata.mixed for _, metadata in stored.values()):
        log.warning("%s has weights stored by --allow-mixed", directory)
    members = sorted(
        (member for member, _ in stored.values()),
        key=lambda each: (each.run.seeds, each.run.learning_rate, each.run.vary),
    )
    members = [each for each in members if np.isfinite([each.metrics[n] for n in LOSSES]).all()]
    if not members:
        raise UserError(f"all runs in {directory} diverged")
    # families share a run where all seeds in use are equal
    networks = [tuple(map(bytes, jax.tree.leaves(member.params))) for member in members]
    members = dict(zip(networks, members, strict=True)).values()
    configs, runs, params, metrics = zip(*members, strict=True)
    stacked = jax.tree.map(lambda *a: np.stack(a), *params)
    return Committee(configs[0], runs, stacked, metrics, shared.fingerprint)


def _read_committee(path: Path) -> Committee:
    arrays, fields = load_arrays(path)
    if "members" not in fields:
        raise UserError(f"{path} holds the weights of one run: name its directory")
    runs, metrics = zip(*fields["members"], strict=True)
    params = {name: array.astype(np.float32) for name, array in arrays.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    runs = tuple(make_run(*run) for run in runs)
    fingerprint = fields.get("fingerprint", "")
    return Committee(Config.from_json(fields["config"]), runs, params, metrics, fingerprint)


def check_predictions(committee: Committee, dataset: Dataset) -> None:
    """UserError if the runs' accuracy on these images no longer is what was stored.

    A difference of one image in 500 is allowed, for the roundings of other hardware and of float16.
    """
    classes = predict(committee, dataset.test.images).argmax(axis=-1)
    for run, right, stored in zip(
        committee.runs,
        (classes == dataset.test.labels).sum(axis=-1),
        committee.metrics,
        strict=True,
    ):
        if abs(right - stored["test_correct"]) > 1 + len(dataset.test.labels) / 500:
            raise UserError(
                f"the weights of seed {run.seed} had {stored['test_correct']} correct when they"
                f" were trained and have {right} now: the code of the network, or a setting of it,"
                " has changed"
            )


def for_upright(committee: Committee) -> Committee:
    """The same networks for images that are upright: in TFDS those of EMNIST are transposed."""
    if committee.config.dataset.partition("/")[0] != "emnist":
        return committee
    name = "hidden_0" if committee.config.hidden else "output"
    first, pixels = committee.params[name], np.arange(N_PIXELS).reshape(28, 28).T.ravel()
    turned = first | {"kernel": first["kernel"][:, pixels]}
    return committee._replace(params=committee.params | {name: turned})


def predict(run: TrainedRun | Committee, images: np.ndarray) -> np.ndarray:
    """Logits [n, classes] of uint8 images [n, 784] or [n, 28, 28], white on black as in MNIST.

    A committee gives [runs, n, classes].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] not in ((N_PIXELS,), (28, 28)):
        given = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"images must be uint8 [n, 784] or [n, 28, 28], not {given}")
    return np.asarray(predict_logits(run.params, images, config=run.config))
