"""What a report, a resumed sweep and `compact` take by the number of runs, on made-up rows.

    python scripts/report_scale.py
    python scripts/report_scale.py --runs 1000 10000 100000 1000000 10000 \
        --chunk 256 256 256 256 2 --out results/scaling.json

The rows are like those of keras-sgd, with 10,000 predictions each, and the package itself stores
them; `python -m mlp_jax.report` then reads them in a process of its own. There is one sweep at a
time, in a temporary directory (TMPDIR). Exits with status 1 if a report took more memory than
--limit-mb.
"""

import dataclasses
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from benchmark import fresh, peak_mb

import mlp_jax as mj
from mlp_jax.files import make_directory, write_json
from mlp_jax.records import compaction, provenance, rows
from mlp_jax.records import directory as directories
from mlp_jax.training.run import make_run

RECIPE = "keras-sgd"
# An image's chance of error. A beta distribution with the mean error (2.7 %), the disagreement of
# two runs (1.0 %) and the images that no run gets right (1.4 %) of the 30 runs in results/.
CHANCES = (0.006, 0.22)


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tuple[int, ...] = (100_000,)
    """Rows of each sweep."""
    chunk: tuple[int, ...] = (256,)
    """Rows of a file: one number for all sweeps, or one for each."""
    limit_mb: float = 1000
    """Peak memory that a report may take, in 10^6 bytes."""
    seed: int = 0
    """Seed of the made-up rows."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """File for the results, as JSON."""


def write_sweep(directory: Path, runs: int, chunk: int, args: Args) -> dict:
    """Write a sweep of made-up rows; its size on disk, and how long it took to write and check."""
    dataset = mj.load_dataset("mnist", args.data_dir)
    environment = mj.describe_environment()
    about = (RECIPE, mj.RECIPES[RECIPE], dataset.fingerprint, environment)
    metadata = provenance.Metadata(*about, images=dataset.image_fingerprint)
    rng = np.random.default_rng(args.seed)
    labels = dataset.test.labels.astype(np.uint8)
    chances = rng.beta(*CHANCES, len(labels)).astype(np.float32)
    # runs that err on an image nearly always take it for the same class
    taken_for = ((labels + rng.integers(1, 10, len(labels))) % 10).astype(np.uint8)
    directories.claim(directory, metadata)
    seconds = 0.0
    for start in range(0, runs, chunk):
        some = make_rows(start, min(chunk, runs - start), labels, taken_for, chances, rng)
        clock = time.perf_counter()
        rows.write_rows(directory, some, metadata)
        seconds += time.perf_counter() - clock
    sizes = [path.stat().st_size for path in rows.row_files(directory)]
    written = {"runs": runs, "chunk": chunk, "files": len(sizes), "write seconds": seconds}
    return written | {"bytes a row": sum(sizes) / runs}


def check(directory: Path) -> dict:
    """What `sweep` does before it resumes: time, and memory of the process by then."""
    metadata, clock = directories.read_metadata(directory), time.perf_counter()
    finished = rows.finished_runs(directory, metadata)
    seconds, usage = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_SELF)
    assert len(finished) == sum(map(rows.count_rows, rows.row_files(directory)))
    return {"check seconds": seconds, "check peak MB": peak_mb(usage)}


def merge(directory: Path) -> dict:
    """What `compact` makes of the files."""
    clock = time.perf_counter()
    compaction.compact(directory)
    seconds, paths = time.perf_counter() - clock, rows.row_files(directory)
    stored = sum(path.stat().st_size for path in paths)
    return {"compact seconds": seconds, "compact files": len(paths), "compact bytes": stored}


def make_rows(first: int, n: int, labels, taken_for, chances, rng: np.random.Generator) -> list:
    """Rows of the seeds from `first`, `n` of them; by epoch, losses fall and accuracies rise."""
    from mlp_jax.training.fit import Progress

    config = mj.RECIPES[RECIPE]
    wrong = rng.random((n, len(labels)), dtype=np.float32) < chances
    predictions = np.where(wrong, taken_for, labels)
    right = np.count_nonzero(predictions == labels, axis=1)
    epochs = np.arange(1, config.epochs + 1)
    noise = rng.standard_normal((3, n, config.epochs)).astype(np.float32)
    behind = 1000 * (1 / epochs - 1 / config.epochs) + 5 * np.abs(noise[0]) * (epochs < epochs[-1])
    correct = (right[:, None] - behind).astype(np.int32)
    test_loss = ((0.1 + 0.5 / epochs) * (1 + 0.01 * noise[1])).astype(np.float32)
    train_loss = ((0.1 + 1.2 / epochs) * (1 + 0.01 * noise[2])).astype(np.float32)
    history = {"train_loss": train_loss, "test_loss": test_loss, "test_correct": correct}
    runs = tuple(make_run(first + i, config.learning_rate) for i in range(n))
    progress = Progress(config, runs, config.epochs, history, predictions, [], "")
    return rows.make_rows(RECIPE, progress, seconds=1.44 * config.epochs)


def report(directory: Path, args: Args) -> dict:
    """What `mlp_jax.report` takes as a whole process: peak memory, and wall and CPU seconds."""
    data = ["--data-dir", str(args.data_dir)] if args.data_dir else []
    command = [sys.executable, "-m", "mlp_jax.report", str(directory), *data]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--out", f"{directory}.report"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {shlex.join(command)} ended with status {process.returncode}")
    return {
        "report peak MB": peak_mb(usage),
        "report seconds": seconds,
        "report CPU seconds": usage.ru_utime + usage.ru_stime,
    }


def main(args: Args) -> None:
    chunks = args.chunk * len(args.runs) if len(args.chunk) == 1 else args.chunk
    if len(chunks) != len(args.runs) or min(*chunks, *args.runs) < 1:
        sys.exit("error: --chunk takes one number, or as many as --runs, each at least 1")
    # not here: a process starts with the peak memory of its parent, which must stay small
    environment = fresh(mj.describe_environment)
    sweeps = []
    for runs, chunk in zip(args.runs, chunks, strict=True):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place, "sweep")
            make_directory(directory / "runs")
            written = fresh(write_sweep, directory, runs, chunk, args)
            sweep = written | fresh(check, directory) | report(directory, args)
            sweeps.append(sweep | (fresh(merge, directory) if chunk < compaction.SIZE else {}))
        cells = {name: round(value, 2) for name, value in sweeps[-1].items()}
        print(", ".join(f"{name} {value:,}" for name, value in cells.items()), flush=True)
        if args.out:
            about = {"command": shlex.join(["python", *sys.argv]), "environment": environment}
            write_json(args.out, about | {"limit MB": args.limit_mb, "sweeps": sweeps})
    most = max(sweeps, key=lambda each: each["report peak MB"])
    if most["report peak MB"] > args.limit_mb:
        sys.exit(
            f"FAILED: the report on {most['runs']} runs took {most['report peak MB']:.0f} MB, more"
            f" than {args.limit_mb:.0f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
