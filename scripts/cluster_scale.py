"""What Ray's queue costs a sweep: thousands of chunks of a net that trains in no time.

    python scripts/cluster_scale.py --out results/cluster.json

A head and two nodes run on this machine. A chunk is a run of one step on 64 images, so its time,
with its training and its file, is an upper bound on what its scheduling costs. The rows must be
those of a sweep without Ray. Exits with status 1 if a chunk took longer than --limit-ms.
"""

import contextlib
import dataclasses
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from benchmark import fresh, peak_mb
from faults import ray_cluster

import mlp_jax as mj
from mlp_jax.files import write_json

NODES = 2
SMALL = {"hidden": (2,), "batch_size": 64, "epochs": 1, "dropout": 0.0}


@dataclasses.dataclass(frozen=True)
class Args:
    chunks: tuple[int, ...] = (1_000, 10_000)
    """Chunks of each sweep, of one run each."""
    limit_ms: float = 20
    """Milliseconds that a chunk may take."""
    out: Path | None = None
    """File for the results, as JSON."""


def describe() -> dict:
    import ray

    environment = mj.describe_environment()
    return environment | {"versions": environment["versions"] | {"ray": ray.__version__}}


def train(chunks: int, address: str | None) -> tuple[dict, list]:
    """A sweep of `chunks` runs in this process, and its rows."""
    from mlp_jax.cluster import connect
    from mlp_jax.experiment import open_experiment
    from mlp_jax.records import rows
    from mlp_jax.training.arrays import Split, make_dataset
    from mlp_jax.training.config import Config
    from mlp_jax.training.run import make_runs

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 784)).astype(np.uint8)
    split = Split(images, rng.integers(0, 10, 64).astype(np.int32))
    dataset, config = make_dataset("made_up", split, split, 10), Config(**SMALL)
    runs = make_runs(range(chunks), ["all"], [config.learning_rate])
    connected = connect(address) if address else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as place, connected as cluster:
        options = {"recipe": "custom", "devices": 1, "chunk": 1, "cluster": cluster}
        with open_experiment(Path(place), config, dataset, runs, **options) as experiment:
            start = time.perf_counter()
            for _ in experiment.train(runs):
                pass
            seconds = time.perf_counter() - start
        table = rows.read_runs(place).drop_columns("seconds")
    measured = {"chunks": chunks, "seconds": seconds, "ms a chunk": 1000 * seconds / chunks}
    peak = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    return measured | {"driver peak MB": peak}, table.to_pylist()


def main(args: Args) -> None:
    sweeps = []
    _, plain = fresh(train, max(args.chunks), None)
    with ray_cluster(NODES) as cluster:
        for chunks in args.chunks:
            measured, rows = fresh(train, chunks, cluster.address)
            if rows != plain[:chunks]:
                sys.exit("error: on Ray the rows are others")
            sweeps.append(measured)
            cells = {name: round(value, 2) for name, value in measured.items()}
            print(", ".join(f"{name} {value:,}" for name, value in cells.items()), flush=True)
    if args.out:
        about = {"command": shlex.join(["python", *sys.argv]), "environment": fresh(describe)}
        write_json(args.out, about | {"nodes": NODES, "limit ms": args.limit_ms, "sweeps": sweeps})
    if (most := max(sweep["ms a chunk"] for sweep in sweeps)) > args.limit_ms:
        sys.exit(f"FAILED: a chunk took {most:.1f} ms, more than {args.limit_ms:g}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
