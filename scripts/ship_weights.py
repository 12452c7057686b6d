"""The weights that come with mlp_jax: the first runs of a sweep with --keep-weights, in one file.

    python scripts/seed_sweep.py best-augmented
    python scripts/ship_weights.py results/best-augmented

It replaces mlp_jax/weights/mnist.npz, whose networks read digits. It prints how many test
images they get right, by themselves and together, before and after their weights are rounded to
float16, and the digest by which their students name them.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import traverse_util

import mlp_jax as mj
from mlp_jax.errors import UserError
from mlp_jax.files import save_arrays
from mlp_jax.records import checkpoint
from mlp_jax.training.arrays import params_digest


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of the sweep."""
    members: int = 5
    """How many runs to ship, those of the lowest seeds."""


def first(committee: checkpoint.Committee, n: int) -> checkpoint.Committee:
    params = jax.tree.map(lambda leaf: leaf[:n], committee.params)
    runs, metrics = committee.runs[:n], committee.metrics[:n]
    return committee._replace(runs=runs, params=params, metrics=metrics)


def save_committee(path: Path, committee: checkpoint.Committee) -> None:
    """What `load_committee` reads: all in one file, in float16, half the size and as good."""
    params = traverse_util.flatten_dict(committee.params, sep="/")
    runs = [(run.seed, run.learning_rate, run.vary) for run in committee.runs]
    members = list(zip(runs, committee.metrics, strict=True))
    about = {"config": dataclasses.asdict(committee.config), "members": members}
    about["fingerprint"] = committee.fingerprint
    save_arrays(path, {name: a.astype(np.float16) for name, a in params.items()}, about)


def main(args: Args) -> None:
    committee = checkpoint.load_committee(args.directory)
    if not 1 <= args.members <= len(committee.runs):
        raise UserError(f"--members must be from 1 to {len(committee.runs)}, not {args.members}")
    exact = first(committee, args.members)
    checkpoint.SHIPPED.parent.mkdir(exist_ok=True)
    save_committee(checkpoint.SHIPPED, exact)
    test = mj.load_dataset(exact.config.dataset).test
    for name, committee in (("float32", exact), ("float16", checkpoint.load_committee())):
        logits = mj.predict(committee, test.images)
        alone = (logits.argmax(-1) == test.labels).sum(-1)
        together = np.asarray(jax.nn.softmax(logits)).mean(0).argmax(-1) == test.labels
        print(f"{name}: {alone.tolist()} of {len(test.labels)}, together {together.sum()}")
    print(checkpoint.SHIPPED, params_digest(committee.params))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
