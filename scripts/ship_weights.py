"""The weights that come with mlp_jax: those of a sweep with --keep-weights, in one file.

    python -m mlp_jax.sweep --recipe keras-rmsprop --schedule cosine --seeds 0:5 --keep-weights \\
        --out runs/committee
    python scripts/ship_weights.py runs/committee

It replaces mlp_jax/weights/mnist.npz and prints how many test images its runs get right, by
themselves and together, before and after their weights are rounded to float16.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import traverse_util

import mlp_jax as mj
from mlp_jax.files import save_arrays
from mlp_jax.records import checkpoint


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of the sweep."""


def save_committee(path: Path, committee: checkpoint.Committee) -> None:
    """What `load_committee` reads: all in one file, in float16, half the size and as good."""
    params = traverse_util.flatten_dict(committee.params, sep="/")
    runs = [(run.seed, run.learning_rate, run.vary) for run in committee.runs]
    members = list(zip(runs, committee.metrics, strict=True))
    about = {"config": dataclasses.asdict(committee.config), "members": members}
    save_arrays(path, {name: a.astype(np.float16) for name, a in params.items()}, about)


def main(args: Args) -> None:
    exact = checkpoint.load_committee(args.directory)
    checkpoint.SHIPPED.parent.mkdir(exist_ok=True)
    save_committee(checkpoint.SHIPPED, exact)
    test = mj.load_dataset(exact.config.dataset).test
    for name, committee in (("float32", exact), ("float16", checkpoint.load_committee())):
        logits = mj.predict(committee, test.images)
        alone = (logits.argmax(-1) == test.labels).sum(-1)
        together = np.asarray(jax.nn.softmax(logits)).mean(0).argmax(-1) == test.labels
        print(f"{name}: {alone.tolist()} of {len(test.labels)}, together {together.sum()}")
    print(checkpoint.SHIPPED)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
