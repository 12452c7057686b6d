"""Speed as ratios from interleaved runs, beside peers, each with the accuracy that it reached.

    pip install -e ".[bench]"
    python scripts/benchmark.py users       an epoch of one run, beside peers as users write them
    python scripts/benchmark.py epoch       an epoch of one run, beside Keras on JAX at its best
    python scripts/benchmark.py sweep       seeds per hour, beside single runs and Keras at its best
    python scripts/benchmark.py whole       the same beside single runs, as whole processes, of
                                            long runs and of short ones
    python scripts/benchmark.py scaling     time per seed, and memory, by the number of seeds
    python scripts/benchmark.py devices     time per seed, with more devices than cores
    python scripts/benchmark.py process     whole processes, from start to end
    python scripts/benchmark.py users epoch sweep whole scaling devices process --out benchmark.json
    python scripts/benchmark.py --draw benchmark.json       benchmark.png, of the first three

A peer *as its users write it* is the script of its README or tutorial, with nothing tuned. One *at
its best* has the settings that were found to be its fastest, in each of two layouts.

Each peer has processes of its own, which compile and warm up before anything is timed. They take
turns, A B C A B C ..., and train and score two epochs in each. The second is timed; the first warms
the process up again. A ratio compares the turns of one round, so other load on the machine affects
both. Keep the machine idle otherwise.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Literal

import tyro
from _peers import (
    FOREVER,
    PARAMETERS,
    missing,
    train_flax,
    train_keras,
    train_keras_at_best,
    train_torch,
)

import mlp_jax as mj
from mlp_jax.files import save_figure, write_json

RECIPE = "keras-sgd"
Part = Literal["users", "epoch", "sweep", "whole", "scaling", "devices", "process"]
EPOCHS_A_TURN = 2
ROUNDS = {"users": 8, "epoch": 25, "sweep": 8, "process": 5}  # a few minutes per part on two cores
WHOLE_ROUNDS, WHOLE_SEEDS = 3, {"keras-sgd": 4, "short": 40}  # twenty minutes
SIZES = (2, 4, 8, 16, 32, 64)
SEED_EPOCHS = 16  # timed for each size at least, so small sizes are timed as long as larger ones
# Test accuracies after equally many epochs; the first epoch reaches about 0.87.
MAX_APART, MIN_ACCURACY = 0.015, 0.8
# PyTorch's own initial weights are smaller and delay it: it makes 1.35 times as many errors after
# 3 epochs, 1.30 times as many after 8 and after 21; with Glorot's weights, as many as the others.
MAX_TIMES_ERRORS = 1.5
PRODUCTS = "the matrix products alone"
EVAL_BATCH = 1000  # test images that mlp_jax scores at once
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
PREPARE = "preparing Fashion-MNIST's files"
SHAPES = mj.RECIPES[RECIPE].batch_size, mj.RECIPES[RECIPE].hidden
USERS, BEST = "as its users write it", "at its best"
HEADINGS = {
    "users": f"one run, each {USERS}",
    "epoch": f"one run, each {BEST}",
    "sweep": f"as many seeds as cores, each {BEST}",
}


@dataclasses.dataclass(frozen=True)
class Args:
    parts: tyro.conf.Positional[tuple[Part, ...]] = ()
    """What to measure."""
    draw: Path | None = None
    """Measure nothing, but draw these results, beside them."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    rounds: int | None = None
    """Turns of each peer; default: what takes a few minutes on two cores."""
    out: Path | None = None
    """File for the results, as JSON."""


class Peer:
    """A way to train, in one process or in several at once; `seconds` per seed, by turn."""

    def __init__(self, name: str, train: Callable, *args, cores: list[set[int]] | None = None):
        self.name, self.seconds, self.pipes = name, [], []
        context = multiprocessing.get_context("spawn")
        for seed, pinned in enumerate(cores or [None]):
            pipe, end = context.Pipe()
            serve_args = (end, pinned, train, seed, *args)
            context.Process(target=serve, args=serve_args, daemon=True).start()
            end.close()
            self.pipes.append(pipe)
        self.accuracies = self.results()

    def results(self) -> list[float]:
        """Wait for the test accuracies of all seeds in all processes."""
        try:
            return [accuracy for pipe in self.pipes for accuracy in pipe.recv()]
        except EOFError:
            sys.exit(f"error: {self.name} ended early, see above")

    def turn(self) -> None:
        for _ in range(EPOCHS_A_TURN):
            start = time.perf_counter()
            for pipe in self.pipes:
                pipe.send("go")
            self.accuracies = self.results()
        self.seconds.append((time.perf_counter() - start) / len(self.accuracies))


def serve(pipe, pinned: set[int] | None, train: Callable, *args) -> None:
    """A peer's process: `train` sends its accuracies after each epoch, and waits for its turn."""
    if pinned:
        os.sched_setaffinity(0, pinned)  # decides how many threads XLA starts
        os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

    def turn(accuracies: list[float]) -> None:
        pipe.send(accuracies)
        try:
            pipe.recv()
        except EOFError:  # the benchmark is done with this peer
            sys.exit()

    train(turn, *args)


def train_mlp_jax(turn: Callable, seed: int, data_dir: Path | None, layout: str) -> None:
    """One run as mlp_jax.train places it ("single"), or one per core as mlp_jax.sweep ("sweep")."""
    import jax

    seeds = [seed]
    if layout == "sweep":
        mj.use_cores()
        seeds = range(jax.local_device_count())
    for progress in fit(seeds, FOREVER, data_dir):
        sizes = (leaf.size for leaf in jax.tree.leaves(progress.fetch_params()))
        assert sum(sizes) == PARAMETERS * len(seeds)
        turn(list(progress.test_accuracy))


def fit(seeds: Iterable[int], epochs: int, data_dir: Path | None) -> Iterator:
    config = dataclasses.replace(mj.RECIPES[RECIPE], epochs=epochs)
    return mj.fit(config, mj.load_dataset("mnist", data_dir), seeds=seeds)


def train_products(turn: Callable, seed: int, batch_size: int, hidden: tuple[int, ...]) -> None:
    """Only the matrix products of an epoch and its evaluation, as XLA runs them."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    widths = (784, *hidden, 10)

    def forward(weights, x):
        return list(itertools.accumulate(weights, jnp.matmul, initial=x))

    @jax.jit
    def epoch(weights, x, x_test):
        def step(weights, _):
            *inputs, d = forward(weights, x)
            grads = []
            for i in reversed(range(len(weights))):
                if i == len(hidden):  # as model.narrow_product does
                    grads.append(lax.optimization_barrier(d.T @ inputs[i]).T)
                else:
                    grads.append(inputs[i].T @ d)
                d = d @ weights[i].T if i else d
            return grads[::-1], None

        weights, _ = lax.scan(step, weights, length=-(-60_000 // batch_size))
        return lax.map(lambda x: forward(weights, x)[-1], x_test)

    weights = [jnp.zeros(shape) for shape in itertools.pairwise(widths)]
    x, x_test = (jnp.zeros(n) for n in ((batch_size, 784), (10_000 // EVAL_BATCH, EVAL_BATCH, 784)))
    while True:
        epoch(weights, x, x_test).block_until_ready()
        turn([None])


def add(peers: list[Peer], needs: Iterable[str], name: str, *args, **kwargs) -> None:
    """A Peer of these arguments, unless it needs what is not installed."""
    if need := missing(needs):
        print(f'without {name}: {need} is not installed (".[bench]" has the packages)')
    else:
        peers.append(Peer(name, *args, **kwargs))


def interleave(peers: list[Peer], rounds: int) -> list[dict]:
    """`rounds` turns of each peer; rows with ratios to the first. Exits if accuracies differ."""
    for _ in range(rounds):
        for peer in peers:
            peer.turn()
    for pipe in (pipe for peer in peers for pipe in peer.pipes):
        pipe.close()
    rows = timed({peer.name: peer.seconds for peer in peers})
    for row, peer in zip(rows, peers, strict=True):
        accuracy = None if None in peer.accuracies else mean(peer.accuracies)
        row |= {"test accuracy": accuracy, "after epochs": EPOCHS_A_TURN * rounds + 1}
        row["seeds per hour"] = 3600 / (row["seconds"] * mj.RECIPES[RECIPE].epochs)
    if not are_same_training(rows):
        show("FAILED: these accuracies are not those of the same training", rows)
        sys.exit(1)
    return rows


def are_same_training(rows: list[dict]) -> bool:
    """Whether the accuracies, where there are any, are the first one's, as nearly as expected."""
    first = rows[0]["test accuracy"]
    for row in rows:
        if (accuracy := row["test accuracy"]) is not None:
            lowest = first - MAX_APART
            if row["what"].startswith("PyTorch"):
                lowest = 1 - MAX_TIMES_ERRORS * (1 - first)
            if not max(lowest, MIN_ACCURACY) <= accuracy <= first + MAX_APART:
                return False
    return True


def timed(seconds: dict[str, list[float]]) -> list[dict]:
    """Rows of medians and ranges; each ratio is to the first's turn of the same round."""
    first = next(iter(seconds.values()))
    rows = []
    for name, own in seconds.items():
        rows.append({"what": name})
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        for column, values in (("seconds", own), ("ratio", ratios)):
            limits = {f"{column} min": min(values), f"{column} max": max(values)}
            rows[-1] |= {column: median(values)} | limits
    return rows


def measure_users(args: Args) -> dict:
    data_dir = args.data_dir
    peers = [Peer("mlp_jax, one run", train_mlp_jax, data_dir, "single")]
    for name, backend in (("TensorFlow", "tensorflow"), ("JAX", "jax")):
        add(peers, ("keras", backend), f"Keras on {name}", train_keras, data_dir, backend)
    add(peers, ("torch",), "PyTorch", train_torch, data_dir, False)
    add(peers, ("torch", "c++"), "PyTorch, compiled", train_torch, data_dir, True)
    peers.append(Peer("Flax and Optax", train_flax, data_dir))
    peers.append(Peer(PRODUCTS, train_products, *SHAPES))
    return {"users": compare(peers, args.rounds or ROUNDS["users"], USERS)}


def measure_epoch(args: Args) -> dict:
    peers = [Peer("mlp_jax, one run", train_mlp_jax, args.data_dir, "single")]
    add(peers, ("keras",), "Keras on JAX", train_keras_at_best, args.data_dir, "jax")
    return {"epoch": compare(peers, args.rounds or ROUNDS["epoch"], BEST)}


def compare(peers: list[Peer], rounds: int, kind: str) -> list[dict]:
    rows = interleave(peers, rounds)
    show(f"one epoch and its evaluation, {kind}, seconds; ratios to the first line", rows)
    for row in rows[1:]:
        print(f"mlp_jax takes {1 / row['ratio']:.2f} of the time of {row['what']}")
    return rows


def measure_sweep(args: Args) -> dict:
    cores = [{core} for core in sorted(os.sched_getaffinity(0))]
    peers = [
        Peer("mlp_jax, a sweep", train_mlp_jax, args.data_dir, "sweep"),
        Peer("mlp_jax, single runs", train_mlp_jax, args.data_dir, "single"),
        Peer("mlp_jax, one process per core", train_mlp_jax, args.data_dir, "single", cores=cores),
    ]
    for name, backend in (("JAX", "jax"), ("TF", "tensorflow")):
        for layout, pinned in (("one process", None), ("one per core", cores)):
            peer = f"Keras on {name}, {layout}", train_keras_at_best, args.data_dir, backend
            add(peers, ("keras", backend), *peer, cores=pinned)
    peers.append(Peer(PRODUCTS, train_products, *SHAPES, cores=cores))
    rows = interleave(peers, args.rounds or ROUNDS["sweep"])
    title = f"seconds per seed and epoch, with evaluation, {BEST}; ratios to the first line"
    show(title, rows)
    for name in ("single runs", "Keras on JAX", "Keras on TF"):
        if ways := [row for row in rows if name in row["what"]]:
            best = min(ways, key=lambda row: row["ratio"])
            print(f"a sweep trains {best['ratio']:.2f} times as many seeds as {best['what']}")
    return {"sweep": rows}


def measure_whole(args: Args) -> dict:
    """A sweep, then each of its seeds in a process of its own: one after another, and one per core.

    Exits if a result differs.
    """
    record = {}
    for recipe, n_seeds in WHOLE_SEEDS.items():
        seconds: dict[str, list[float]] = {}
        for _ in range(WHOLE_ROUNDS):
            for name, took in time_whole(args, recipe, n_seeds).items():
                seconds.setdefault(name, []).append(took / n_seeds)
        rows, epochs = timed(seconds), mj.RECIPES[recipe].epochs
        show(
            f"whole processes, {n_seeds} seeds of {recipe}, {epochs} epochs: seconds per seed", rows
        )
        record[f"whole {recipe}"] = rows
    return record


def time_whole(args: Args, recipe: str, n_seeds: int) -> dict[str, float]:
    """Seconds of each way to train the same seeds."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:

        def train(way: str, seeds: Iterable[int], core: int | None = None) -> float:
            start = time.perf_counter()
            for seed in seeds:
                flags = ["--seed", str(seed), "--out", f"{scratch}/{way}/{seed}"]
                run("train", args, "--recipe", recipe, *flags, core=core)
            return time.perf_counter() - start

        flags = ["--recipe", recipe, "--seeds", f"0:{n_seeds}", "--out", f"{scratch}/sweep"]
        seconds = {"mlp_jax.sweep": run("sweep", args, *flags)[0]}
        seconds["mlp_jax.train, one after another"] = train("alone", range(n_seeds))
        shares = [range(n_seeds)[i :: len(cores)] for i in range(len(cores))]
        with ThreadPoolExecutor(len(cores)) as pool:
            ended = pool.map(train, itertools.repeat("pinned"), shares, cores)
            seconds["mlp_jax.train, one per core"] = max(ended)
        table = mj.read_runs(Path(scratch, "sweep"), ["test_correct"]).to_pydict()
        for seed, correct in zip(table["seed"], table["test_correct"], strict=True):
            # on a single core XLA rounds some recipes differently
            for way, apart in (("alone", 0), ("pinned", 10_000 * MAX_APART)):
                summary = json.loads(Path(scratch, way, str(seed), "summary.json").read_text())
                if abs(summary["test_correct"] - correct) > apart:
                    sys.exit(f"FAILED: seed {seed}: {correct} right in the sweep; {way}: {summary}")
    return seconds


def run(front: str, args: Args, *flags: str, core: int | None = None) -> tuple[float, float]:
    """What `time_process` says of `python -m mlp_jax.<front>`, on one core or on all."""
    data = ["--data-dir", str(args.data_dir)] if args.data_dir else []
    pin = ["taskset", "-c", str(core)] if core is not None else []
    return time_process([*pin, sys.executable, "-m", f"mlp_jax.{front}", *flags, "--quiet", *data])


def time_process(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of a process, from start to end; exits if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    return seconds, peak_mb(usage)


def peak_mb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure_process(args: Args) -> dict:
    processes: dict[str, list] = {"train --help": [], "train --epochs 1": []}
    if FASHION.exists():
        processes[PREPARE] = []
    load = "import mlp_jax; mlp_jax.load_dataset('fashion_mnist', {!r}, {!r})"
    for _ in range(args.rounds or ROUNDS["process"]):
        processes["train --help"].append(run("train", args, "--help"))
        with tempfile.TemporaryDirectory() as out:
            processes["train --epochs 1"].append(run("train", args, "--epochs", "1", "--out", out))
        if FASHION.exists():
            with tempfile.TemporaryDirectory() as new:
                command = [sys.executable, "-c", load.format(new, str(FASHION))]
                processes[PREPARE].append(time_process(command))
    rows = []
    for name, each in processes.items():
        seconds, peaks = zip(*each, strict=True)
        rows.append(timed({name: seconds})[0] | {"peak MB": max(peaks)})
    show("whole processes", rows)
    return {"process": rows}


def measure_scaling(args: Args) -> dict:
    rows = []
    for size in SIZES:
        rows.append(fresh(train_size, args.data_dir, size))
    show("sweeps by their seeds: seconds per seed and epoch, peak memory, the runs' state", rows)
    grown, state = (rows[-1][name] - rows[0][name] for name in ("peak MB", "state MB"))
    print(f"from {SIZES[0]} to {SIZES[-1]} seeds memory grows by {grown / state:.2f} of the state")
    return {"scaling": rows}


def measure_devices(args: Args) -> dict:
    """As many seeds as devices, which share the cores: their time beyond that of two is overhead.

    A group of runs ends an epoch with its slowest device, so this counts the waiting, too.
    """
    rows = []
    for n_devices in SIZES:
        rows.append(fresh(train_size, args.data_dir, n_devices, n_devices))
        rows[-1]["ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
    show("sweeps by their devices, a seed on each: seconds per seed and epoch", rows)
    return {"devices": rows}


def fresh(function: Callable, *args):
    """The result of `function` in a new process, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def train_size(data_dir: Path | None, size: int, n_devices: int | None = None) -> dict:
    """Seconds per seed and epoch of `size` seeds; by default on a device per core."""
    import jax

    mj.use_cores(n_devices)
    epochs = -(-SEED_EPOCHS // size)
    training = fit(range(size), 1 + epochs, data_dir)
    next(training)  # compiles, and makes the initial weights
    start = time.perf_counter()
    *_, progress = training
    seconds = time.perf_counter() - start
    peak = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    return {
        "seeds": size,
        "epochs": 1 + epochs,
        "seconds": seconds / size / epochs,
        "peak MB": peak,
        # plain SGD: a run's state is its parameters
        "state MB": sum(leaf.nbytes for leaf in jax.tree.leaves(progress.fetch_params())) / 1e6,
        "test accuracy": float(progress.test_accuracy.mean()),
    }


def draw(record: dict):
    """Seconds of an epoch relative to mlp_jax's, with their range over the rounds, by part."""
    from mlp_jax.analysis.figures import BLUE, GRAY, ORANGE, new_figure

    parts = {part: record[part] for part in HEADINGS if part in record}
    n = sorted({row["after epochs"] // EPOCHS_A_TURN for part in parts.values() for row in part})
    machine = "{cores} cores of {processor}".format(**record["environment"])
    rounds = f"{' or '.join(map(str, n))} rounds"
    title = f"An epoch of keras-sgd and its evaluation: {machine}, {rounds}"
    figure, ax = new_figure(title, 1.2 + 0.24 * sum(len(part) + 1 for part in parts.values()))
    names: list[str] = []
    for part, rows in parts.items():
        inset = {"textcoords": "offset points", "va": "center", "size": 9}
        ax.annotate(HEADINGS[part], (0, len(names)), (3, 0), fontweight="bold", **inset)
        names.append("")
        top = len(names)
        for row in rows:
            ratio, ends = row["ratio"], [row["ratio min"], row["ratio max"]]
            if row["what"] == PRODUCTS:
                between = [top - 0.5, len(names) - 0.5]
                ax.plot([ratio] * 2, between, "--", color=ORANGE)
                continue
            y, ours = len(names), row["what"].startswith("mlp_jax")
            ax.barh(y, ratio, 0.7, color="#A9CDE5" if ours else "#D9D9D9")
            ax.plot(ends, [y, y], color=BLUE if ours else GRAY)
            ax.annotate(f"{ratio:.2f} ({row['seconds']:.2f} s)", (ends[1], y), (4, 0), **inset)
            names.append(row["what"])
    ax.set_yticks([y for y, name in enumerate(names) if name], [*filter(None, names)])
    label = "seconds per seed, relative to the first bar of each block\n"
    label += f"solid lines: range over the rounds; dashed: {PRODUCTS}, in XLA"
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
    return figure


def show(title: str, rows: list[dict]) -> None:
    lines = [list(rows[0])]
    lines += [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print(*(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), sep="  ")
    sys.stdout.flush()


def describe() -> dict:
    """Processor, cores and versions, which are printed and stored with the results."""
    environment = mj.describe_environment()
    for name in ("keras", "tensorflow-cpu", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment["versions"][name] = importlib.metadata.version(name)
    print(f"{environment['processor']}, {environment['cores']} cores")
    versions = environment["versions"].items()
    print(", ".join(f"{name} {version}" for name, version in versions), flush=True)
    return environment


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.draw:
        figure = draw(json.loads(args.draw.read_text()))
        save_figure(args.draw.with_suffix(".png"), figure, dpi=125)
        sys.exit()
    # not here: a process starts with the peak memory of its parent, which must stay small
    record = {"command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]])}
    record |= {"environment": fresh(describe)}
    for part in args.parts:
        record |= globals()[f"measure_{part}"](args)
        if args.out:
            write_json(args.out, record)
