"""What was tried to make a sweep, and the start of a run, faster; ratios from interleaved runs.

    python scripts/tries.py --out results/tries.json

A sweep of `keras-sgd`, one seed per core, is timed beside itself with one thing changed. As in
scripts/benchmark.py the changed ones take turns; here a turn is several epochs without a pause. The
start is `train --epochs 1`, as whole processes, with XLA's own ways to compile faster. Keep the
machine idle otherwise.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from unittest import mock

import jax
import tyro
from benchmark import FOREVER, RECIPE, Peer, describe, fresh, run, show, time_process, timed

import mlp_jax as mj
from mlp_jax.files import write_json
from mlp_jax.training.arrays import Split
from mlp_jax.training.parallel import Placement, n_cores, use_cores

EPOCHS = 4  # without a pause
AS_IT_IS = "as it is"
FLAGS = {
    AS_IT_IS: "",
    "LLVM's optimization at level 1": "--xla_backend_optimization_level=1",
    "LLVM's optimization at level 2": "--xla_backend_optimization_level=2",
    "no expensive passes of LLVM": "--xla_llvm_disable_expensive_passes=true",
    "code generation in 1 part": "--xla_cpu_parallel_codegen_split_count=1",
    "code generation in 8 parts": "--xla_cpu_parallel_codegen_split_count=8",
}


@dataclasses.dataclass(frozen=True)
class Args:
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    rounds: int = 4
    """Turns of each."""
    out: Path | None = None
    """File for the results, as JSON."""


def train_sweep(turn: Callable, seed: int, data_dir: Path | None, **changes) -> None:
    """One seed per core, all of which wait for the slowest after each epoch."""
    use_cores()
    config = dataclasses.replace(mj.RECIPES[RECIPE], epochs=FOREVER, **changes)
    advance(turn, [mj.fit(config, mj.load_dataset("mnist", data_dir), seeds=range(n_cores()))])


def train_streams(turn: Callable, seed: int, data_dir: Path | None) -> None:
    """A training per core, each on its own device and in its own thread: none waits for another."""
    use_cores()
    config = dataclasses.replace(mj.RECIPES[RECIPE], epochs=FOREVER)
    data = mj.load_dataset("mnist", data_dir)
    placements = [Placement((device,), 1) for device in jax.local_devices()]
    trainings = [
        mj.fit(config, data, seeds=[i], placement=placement)
        for i, placement in enumerate(placements)
    ]
    advance(turn, trainings)


def train_unrolled(turn: Callable, seed: int, data_dir: Path | None) -> None:
    """A sweep of the same random bits, with the cipher's rounds unrolled as JAX does on GPUs."""
    from jax._src.interpreters import mlir
    from jax._src.random import threefry2x32 as cipher

    rule = cipher._threefry2x32_lowering_rule
    mlir.register_lowering(cipher.threefry2x32_p, rule, platform="cpu")
    train_sweep(turn, seed, data_dir)


def train_with_little_scoring(turn: Callable, seed: int, data_dir: Path | None) -> None:
    """A sweep that is scored on a tenth of the test images."""

    def load(*args):
        data = load_dataset(*args)
        test = Split(*(array[:1000] for array in data.test))
        return data._replace(test=test)

    load_dataset = mj.load_dataset
    with mock.patch.object(mj, "load_dataset", load, create=True):
        train_sweep(turn, seed, data_dir)


def advance(turn: Callable, trainings: list) -> None:
    """Turns of EPOCHS epochs of all trainings, each in a thread."""

    def epochs(training):
        for _ in range(EPOCHS):
            progress = next(training)
        return progress.test_accuracy

    with ThreadPoolExecutor(len(trainings)) as pool:
        while True:
            turn([accuracy for own in pool.map(epochs, trainings) for accuracy in own.tolist()])


def train_without_dropout(turn: Callable, seed: int, data_dir: Path | None) -> None:
    train_sweep(turn, seed, data_dir, dropout=0.0)


CHANGES = {
    AS_IT_IS: train_sweep,
    "a stream of epochs per device": train_streams,
    "the cipher's rounds unrolled": train_unrolled,
    "no dropout": train_without_dropout,
    "scoring 1,000 test images instead of 10,000": train_with_little_scoring,
}


def measure_sweep(args: Args) -> list[dict]:
    peers = [Peer(name, train, args.data_dir) for name, train in CHANGES.items()]
    for _ in range(args.rounds):
        for peer in peers:
            peer.turn()
    rows = timed({peer.name: [s / EPOCHS for s in peer.seconds] for peer in peers})
    for row, peer in zip(rows, peers, strict=True):
        row["test accuracy"] = sum(peer.accuracies) / len(peer.accuracies)
    show("a sweep, one seed per core: seconds per seed and epoch; ratios to the first line", rows)
    return rows


def measure_start(args: Args) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in FLAGS}
    compiling: dict[str, list[float]] = {name: [] for name in FLAGS}
    imports, training, results = [], [], {}
    for _ in range(args.rounds):
        for name, flags in FLAGS.items():
            took, summary, results[name] = start(args, flags)
            seconds[name].append(took)
            compiling[name].append(summary["compile_seconds"])
            if name == AS_IT_IS:
                training.append(summary["train_seconds"])
        load = "import mlp_jax.train, mlp_jax.experiment"
        imports.append(time_process([sys.executable, "-c", load])[0])
    rows = timed(seconds)
    for row, compile_row in zip(rows, timed(compiling), strict=True):
        row |= {"compile seconds": compile_row["seconds"]}
        row["same results"] = results[row["what"]] == results[AS_IT_IS]
    show("train --epochs 1, whole processes: seconds; ratios to the first line", rows)
    return {"rows": rows, "import seconds": median(imports), "epoch seconds": median(training)}


def start(args: Args, flags: str) -> tuple[float, dict, list]:
    """Wall seconds, summary.json and the row of `train --epochs 1`."""
    with tempfile.TemporaryDirectory() as out, mock.patch.dict(os.environ, {"XLA_FLAGS": flags}):
        took, _ = run("train", args, "--epochs", "1", "--out", out)
        summary = json.loads(Path(out, "summary.json").read_text())
        row = mj.read_runs(out).drop_columns(["seconds"]).to_pylist()
    return took, summary, row


def main(args: Args) -> None:
    record = {"command": " ".join(["python", "scripts/tries.py", *sys.argv[1:]])}
    record |= {"environment": fresh(describe), "rounds": args.rounds}
    record |= {"sweep": measure_sweep(args), "start": measure_start(args)}
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
