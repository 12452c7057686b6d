"""The newest state of runs in training, from which they resume, and the weights of finished runs.

Both are files of named arrays that NumPy reads anywhere. A checkpoint resumes only where its
numbers would be the same; weights may be used on any device and version of JAX.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mlp_jax.errors import UserError
from mlp_jax.files import Damaged, load_arrays, quarantine, save_arrays
from mlp_jax.records.provenance import Metadata, check_same
from mlp_jax.training.config import Config
from mlp_jax.training.fit import Snapshot, state_shapes
from mlp_jax.training.model import predict as predict_logits
from mlp_jax.training.run import Run, make_run


def save_checkpoint(path: Path, snapshot: Snapshot, seconds: list[float], metadata: Metadata):
    """Save a training with the wall time of each of its epochs, in place of what `path` has."""
    leaves = jax.tree_util.tree_leaves_with_path(snapshot.state)
    arrays = {f"state{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    arrays |= {f"history/{name}": values for name, values in snapshot.history.items()}
    arrays |= {"predictions": snapshot.predictions, "seconds": np.array(seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, arrays, {"epoch": snapshot.epoch, "run": metadata.to_json()})


def load_checkpoint(path: Path, metadata: Metadata) -> tuple[Snapshot, list[float]] | None:
    """What `save_checkpoint` saved; None if there is none, or a damaged one, which is quarantined.

    UserError if the numbers of that training may not be pooled with those of `metadata`.
    """
    try:
        arrays, about = load_arrays(path)
        check_same(path, stored := Metadata.from_json(about["run"]), metadata)
        if stored.mixed and not metadata.mixed:
            raise UserError(f"{path} was saved with --allow-mixed: resume with it, too")
    except FileNotFoundError:
        return None
    except Damaged as damaged:
        quarantine(damaged)
        return None
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: f"state{jax.tree_util.keystr(path)}", state_shapes(metadata.config)
    )
    if missing := set(jax.tree.leaves(names)) - arrays.keys():
        raise UserError(f"{path} is of other training code: it lacks {min(missing)}")
    state = jax.tree.map(arrays.__getitem__, names)
    prefix = "history/"
    history = {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}
    snapshot = Snapshot(about["epoch"], state, history, arrays["predictions"])
    return snapshot, arrays["seconds"].tolist()


class TrainedRun(NamedTuple):
    """A finished run: its weights, and what they were trained with and reached."""

    config: Config
    run: Run
    params: dict  # NumPy arrays by layer and name
    metrics: dict[str, float]  # test_correct, test_loss, train_loss, ... after the last epoch


def weights_path(directory: Path, run: Run) -> Path:
    return directory / "weights" / f"{run.vary}-lr{run.learning_rate:.9g}-seed{run.seed}.npz"


def save_weights(directory: Path, run: Run, params: dict, metrics: dict, metadata: Metadata):
    """One file for a finished run, its arrays named as in hidden_0/kernel."""
    path = weights_path(directory, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"vary": run.vary, "seed": run.seed, "learning_rate": run.learning_rate}
    about |= {"metrics": metrics, "run": metadata.to_json()}
    save_arrays(path, traverse_util.flatten_dict(params, sep="/"), about)


def has_weights(directory: Path, run: Run) -> bool:
    """Whether the weights of a run are there and intact."""
    try:
        load_arrays(weights_path(directory, run))
        return True
    except FileNotFoundError:
        return False
    except Damaged as damaged:
        quarantine(damaged)
        return False


def load_run(directory: str | Path, seed: int | None = None) -> TrainedRun:
    """The weights in a run's directory, or of `seed` in that of a sweep with --keep-weights.

    Works on any device and version of JAX. UserError if there are none, or several; Damaged.
    """
    folder = Path(directory) / "weights"
    paths = sorted(folder.glob("*.npz" if seed is None else f"*-seed{seed}.npz"))
    if not paths:
        raise UserError(f"{directory} has no weights of a finished run: keep them in a sweep with"
                        " --keep-weights")  # fmt: skip
    if len(paths) > 1:
        raise UserError(f"{directory} has weights of {len(paths)} runs: choose one by its seed")
    arrays, about = load_arrays(paths[0])
    return TrainedRun(
        Metadata.from_json(about["run"]).config,
        make_run(about["seed"], about["learning_rate"], about["vary"]),
        traverse_util.unflatten_dict(arrays, sep="/"),
        about["metrics"],
    )


def predict(run: TrainedRun, images: np.ndarray) -> np.ndarray:
    """Logits [n, classes] of uint8 images [n, 784] or [n, 28, 28], white on black as in MNIST."""
    return np.asarray(predict_logits(run.params, images, config=run.config))
