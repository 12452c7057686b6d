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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from benchmark import FOREVER, RECIPE, Peer, describe, fresh, peak_mb, show, timed
from jax import lax
from threefry import unrolled_bits

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
    rounds: int = 6
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
    """A sweep whose dropout masks are the same, but drawn with the cipher's rounds unrolled."""
    key, shape = jax.random.key(0), (3, 5)
    same = unrolled_bernoulli(key, 0.8, shape) == jax.random.bernoulli(key, 0.8, shape)
    assert same.all()
    with mock.patch.object(jax.random, "bernoulli", unrolled_bernoulli):
        train_sweep(turn, seed, data_dir)


def unrolled_bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bernoulli`: 23 bits as the fraction of a float32 in [1, 2), less 1, below p."""
    ones = jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type((unrolled_bits(key, shape) >> 9) | ones, jnp.float32) - 1 < p


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
    "the cipher of dropout's bits unrolled": train_unrolled,
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
    seconds: dict[str, list[float]] = {name: [] for name in (*FLAGS, "imports alone")}
    compiling: dict[str, list[float]] = {name: [] for name in FLAGS}
    peaks, training, results = [], [], {}
    for _ in range(args.rounds):
        for name, flags in FLAGS.items():
            took, peak, summary, result = start(args, flags)
            seconds[name].append(took)
            compiling[name].append(summary["compile_seconds"])
            if name == AS_IT_IS:
                peaks.append(peak)
                training.append(summary["train_seconds"])
            results[name] = result
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import mlp_jax.train, mlp_jax.experiment"], check=True
        )
        seconds["imports alone"].append(time.perf_counter() - began)
    rows = timed(seconds)
    for row, compile_row in zip(rows, timed(compiling), strict=False):
        row |= {"compile seconds": compile_row["seconds"]}
        row["same results"] = results[row["what"]] == results[AS_IT_IS]
    show("train --epochs 1, whole processes: seconds; ratios to the first line", rows)
    whole = {"peak MB": max(peaks), "epoch seconds": sorted(training)[len(training) // 2]}
    return {"rows": rows} | whole


def start(args: Args, flags: str) -> tuple[float, float, dict, list]:
    """Wall seconds, peak MB, summary.json and the rows of `train --epochs 1`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mlp_jax.train", "--epochs", "1", "--quiet", "--out", out]
        command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        began = time.perf_counter()
        environment = os.environ | {"XLA_FLAGS": flags}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: {command} with XLA_FLAGS={flags} failed")
        summary = json.loads(Path(out, "summary.json").read_text())
        row = mj.read_runs(out).drop_columns(["seconds"]).to_pylist()
    return took, peak_mb(usage), summary, row


def main(args: Args) -> None:
    record = {"command": " ".join(["python", "scripts/tries.py", *sys.argv[1:]])}
    record |= {"environment": fresh(describe), "rounds": args.rounds}
    record |= {"sweep": measure_sweep(args), "start": measure_start(args)}
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
