"""The sweeps behind results/: each resumes where it stopped, and is then summarized.

    python scripts/seed_sweep.py keras-sgd       100 seeds of 50 epochs: hours on two cores
    python scripts/seed_sweep.py short           1,900 runs of one epoch: all, init, order, dropout
    python scripts/seed_sweep.py short-crossed   300 blocks of 8 runs, all streams crossed
    python scripts/seed_sweep.py keras-rmsprop-crossed      25 such blocks of 5 epochs
    python scripts/seed_sweep.py keras-rmsprop   30 seeds of 20 epochs
    python scripts/seed_sweep.py keras-rmsprop-fashion      5 seeds of it on Fashion-MNIST
    python scripts/seed_sweep.py sprint          200 seeds of half an epoch
    python scripts/seed_sweep.py sprint-98       200 seeds of two epochs
    python scripts/seed_sweep.py sprint-99       20 seeds of 40 epochs
    python scripts/seed_sweep.py best            10 seeds of 100 epochs, and their weights
    python scripts/seed_sweep.py best-augmented  25 seeds of 400 epochs, and their weights
    python scripts/seed_sweep.py best-distilled  25 seeds of that, taught by the shipped networks

    python scripts/seed_sweep.py dropout         keras-sgd for 10 epochs: no dropout, or some?
    python scripts/seed_sweep.py products        sprint-98 with bfloat16 products, or float32?
    python scripts/seed_sweep.py epsilon         5 epochs of RMSprop: epsilon outside or in the root

The rows are written to results/NAME/runs/, one chunk after another; the last three compare two
sweeps in results/questions/NAME, and train up to 100 seeds of both until that is decided.
results/keras-sgd-epyc is the first of these on another processor, an AMD EPYC, with --seeds 0:30.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[1]
SWEEPS = {
    "keras-sgd": ["--recipe keras-sgd --seeds 0:100"],
    "short": [
        "--recipe short --seeds 0:300 --vary all init order dropout",
        "--recipe short --seeds 300:1000 --vary all",
    ],
    "short-crossed": ["--recipe short --crossed 300"],
    "keras-rmsprop-crossed": ["--recipe keras-rmsprop --epochs 5 --crossed 25"],
    "keras-rmsprop": ["--recipe keras-rmsprop --seeds 0:30"],
    "keras-rmsprop-fashion": ["--recipe keras-rmsprop --dataset fashion_mnist --seeds 0:5"],
    # not the seeds that their settings were chosen with
    "sprint": ["--recipe sprint --seeds 1000:1200"],
    "sprint-98": ["--recipe sprint-98 --seeds 1000:1200"],
    "sprint-99": ["--recipe sprint-99 --seeds 1000:1020"],
    "best": ["--recipe best --seeds 200:210 --keep-weights"],
    "best-augmented": ["--recipe best-augmented --seeds 200:225 --keep-weights"],
    "best-distilled": ["--recipe best-distilled --seeds 300:325 --keep-weights"],
}
QUESTIONS = {
    "dropout": ("--recipe keras-sgd --epochs 10 --dropout 0 0.2", "dropout=0.0", "dropout=0.2"),
    "products": (
        "--recipe sprint-98 --products bfloat16 float32",
        "products=bfloat16",
        "products=float32",
    ),
    "epsilon": (
        "--recipe keras-rmsprop --epochs 5 --optimizer rmsprop-outside rmsprop",
        "optimizer=rmsprop-outside",
        "optimizer=rmsprop",
    ),
}
"""A grid of two sweeps, and which is compared with which."""


@dataclasses.dataclass(frozen=True)
class Args:
    names: tyro.conf.Positional[tuple[Literal[*SWEEPS, *QUESTIONS], ...]]
    """Sweeps and questions to run, one after another."""


def main(args: Args) -> None:
    for name in args.names:
        if name in QUESTIONS:
            answer(name)
            continue
        out = f"results/{name}"
        for flags in SWEEPS[name]:
            run("mlp_jax.sweep", *flags.split(), "--out", out)
        run("mlp_jax.report", out)


def answer(name: str) -> None:
    """Train the same seeds of both sweeps until a confidence sequence decides, or 100 of each."""
    out = f"results/questions/{name}"
    flags, a, b = QUESTIONS[name]
    run("mlp_jax.sweep", *flags.split(), "--seeds", "0:30", "--out", out)
    decide = ["--until-decided", "--max-seeds", "100"]
    run("mlp_jax.compare", f"{out}/{a}", f"{out}/{b}", *decide, "--out", out)


def run(module: str, *flags: str) -> None:
    """Run a command in a new process, in which the sweep can set up JAX's devices."""
    command = [sys.executable, "-m", module, *flags]
    print("+", *command, flush=True)
    if status := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
