"""results/scaling.md: its tables and numbers follow from its formulas and what was measured."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pyarrow.parquet as pq

from mlp_jax.experiment import chunk_size
from mlp_jax.training import parallel
from mlp_jax.training.config import RECIPES
from mlp_jax.training.fit import run_bytes, state_shapes

RESULTS = Path(__file__).parents[1] / "results"
PAGE = (RESULTS / "scaling.md").read_text()
SWEEPS = json.loads((RESULTS / "scaling.json").read_text())["sweeps"]
BY_SIZE = {(each["runs"], each["chunk"]): each for each in SWEEPS}
CONFIG = RECIPES["keras-sgd"]
P = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(CONFIG).params))
STEPS = CONFIG.epochs * math.ceil(60_000 / CONFIG.batch_size)
# processes, devices of each, memory that JAX may use of a device, bytes a second
MACHINES = {"H200": (1, 1, 105 * 10**9, 4.8e12), "64 v5e chips": (16, 4, 16 * 10**9, 0.819e12)}
A_SEED = {name: STEPS * 7 * 4 * P / machine[-1] for name, machine in MACHINES.items()}
FILES = sorted((RESULTS / "keras-sgd/runs").glob("*.parquet"))
SPEED = json.loads((RESULTS / "speed.json").read_text())
CPU_SECONDS = CONFIG.epochs * SPEED["sweep"][0]["seconds"]
SECONDS = [s for path in FILES for s in pq.read_table(path, columns=["seconds"])[0].to_pylist()]
STORED = sum(path.stat().st_size for path in FILES) / len(SECONDS)
SMALL, LARGE = (BY_SIZE[10_000, chunk] for chunk in (2, 256))  # they differ in files alone
FEWER = SMALL["files"] - LARGE["files"]
B = (SMALL["bytes a row"] - LARGE["bytes a row"]) * 10_000 / FEWER
A = LARGE["bytes a row"] - B * LARGE["files"] / 10_000


def short(x, digits=3):
    return f"{float(f'{x:.{digits}g}'):,g}"


def size(n_bytes):
    return f"{short(n_bytes / 1e9)} GB" if n_bytes >= 1e9 else f"{short(n_bytes / 1e6)} MB"


def line(name, seeds, hours, stored, files, digits=3):
    timed = " | ".join(short(x, digits) for x in (hours, seeds / hours))
    timed = timed if hours > 1 / 60 else "under a minute | -"
    return f"| {name} | {seeds:,} | {timed} | {size(stored)} | {files:,} |"


def modelled(name, seeds, monkeypatch):
    """Hours, bytes and files, with the lanes and chunks that the package itself would choose."""
    processes, n_devices, memory, _ = MACHINES[name]
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": memory})
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * n_devices)
    hours, files = 0, 0
    for own in (len(range(process, seeds, processes)) for process in range(processes)):
        placement = parallel.place(own, run_bytes(CONFIG))
        chunks = math.ceil(own / chunk_size("auto", CONFIG.epochs, placement.width))
        hours = max(hours, chunks * placement.lanes * A_SEED[name] / 3600)
        files += chunks
    return hours, A * seeds + B * files, files


def quoted(mark):
    text = re.search(f"<!-- {mark} -->\n(.*)<!-- /{mark} -->", PAGE, re.DOTALL)[1]
    return [row for row in text.splitlines() if row.startswith("| ")][1:]


def test_the_tables_follow_from_the_measurements_and_the_formulas(monkeypatch):
    hours, chunk = CPU_SECONDS / 3600, chunk_size("auto", CONFIG.epochs, 2)
    name, sizes = "2 CPU cores, measured rate", [10**power for power in range(2, 7)]
    lines = [line(name, n, n * hours, n * STORED, math.ceil(n / chunk)) for n in sizes]
    for name in MACHINES:
        lines += [line(f"{name}, modelled", n, *modelled(name, n, monkeypatch), 1) for n in sizes]
    assert quoted("table") == lines
    names = ("report peak MB", "report CPU seconds", "report seconds", "check seconds")
    for each, row in zip(SWEEPS, quoted("measured"), strict=True):
        took = " | ".join(short(each[name]) for name in names)
        stored = size(each["bytes a row"] * each["runs"])
        assert row == f"| {each['runs']:,} | {each['files']:,} | {stored} | {took} |"
    assert BY_SIZE[100_000, 256]["report peak MB"] < 2000


def test_the_text_quotes_its_numbers():
    text = " ".join(PAGE.split())
    peak, check = "report peak MB", "check seconds"
    a_row = (BY_SIZE[1_000_000, 256][peak] - BY_SIZE[100_000, 256][peak]) / 900
    a_file, a_check = (1000 * (SMALL[name] - LARGE[name]) / FEWER for name in (peak, check))
    gpu, tpu = (m[0] * m[1] * m[-1] / (7 * STEPS / 5) / 1e6 for m in MACHINES.values())
    for words in (
        f"P = {P:,}, S = {STEPS:,} and 7 x 4 P = {7 * 4 * P / 1e6:.2f} MB",
        "{:.0f} ms a seed on an H200 and {:.0f} ms".format(*(1000 * s for s in A_SEED.values())),
        f"A = {A:.0f} bytes a row and B = {B:,.0f} bytes a file (the record: {STORED:,.0f} a row",
        f"of {SPEED['environment']['processor']}, {CPU_SECONDS:.1f} s a seed",
        f"{len(SECONDS)} rows took {min(SECONDS):.0f} to {max(SECONDS):,.0f} s",
        f"{a_row:.1f} KB a row and {a_file:.1f} KB a file",
        f"{a_check:.2f} ms a file, {500 * a_check / 60:.0f} minutes for 500,000",
        f"{gpu:.0f} MB a second on one H200 and {tpu:,.0f} MB",
    ):
        assert words in text, words
