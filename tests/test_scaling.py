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
from mlp_jax.training.programs import run_bytes, state_shapes

RESULTS = Path(__file__).parents[1] / "results"
PAGE = (RESULTS / "scaling.md").read_text()
SWEEPS = json.loads((RESULTS / "scaling.json").read_text())["sweeps"]
CLUSTER = json.loads((RESULTS / "cluster.json").read_text())
BY_SIZE = {(each["runs"], each["chunk"]): each for each in SWEEPS}
CONFIG = RECIPES["keras-sgd"]
P = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(CONFIG).params))
STEPS = CONFIG.epochs * math.ceil(60_000 / CONFIG.batch_size)
TPU = json.loads((RESULTS / "tpu.json").read_text())["rows"]
V5E = next(row for row in TPU if row["topology"] == "v5e:1x1" and row["program"] == "whole")
CYCLES = V5E["cycles_per_step_and_seed"]
CLOCK, BANDWIDTH = 1.5e9, {"H200": 4.8e12, "v5e": 0.819e12}
H200 = {"platform": "gpu", "device_kind": "NVIDIA H200"}
# processes, devices of each, and what a device says of itself
MACHINES = {
    "H200, modelled": (1, 1, H200),
    "64 v5e chips, estimated": (16, 4, {"platform": "tpu", "device_kind": "TPU v5 lite"}),
}
A_SEED = dict(
    zip(MACHINES, (STEPS * 7 * 4 * P / BANDWIDTH["H200"], STEPS * CYCLES / CLOCK), strict=True)
)
FILES = sorted((RESULTS / "keras-sgd/runs").glob("*.parquet"))
SPEED = json.loads((RESULTS / "speed.json").read_text())
CPU_SECONDS = CONFIG.epochs * SPEED["sweep"][0]["seconds"]
SECONDS = [s for path in FILES for s in pq.read_table(path, columns=["seconds"])[0].to_pylist()]
STORED = sum(path.stat().st_size for path in FILES) / len(SECONDS)
SMALL, LARGE = (BY_SIZE[10_000, chunk] for chunk in (2, 256))  # they differ in files alone
FEWER = SMALL["files"] - LARGE["files"]
B = (SMALL["bytes a row"] - LARGE["bytes a row"]) * 10_000 / FEWER
A = LARGE["bytes a row"] - B * LARGE["files"] / 10_000


def test_the_page_quotes_what_more_devices_cost():
    rows = {
        row["seeds"]: row for row in json.loads((RESULTS / "devices.json").read_text())["devices"]
    }
    ratios = [f"{rows[n]['seconds'] / rows[2]['seconds']:.2f}" for n in (8, 16, 64)]
    page = PAGE.replace("\n", " ")
    assert "take {}, {} and {} times as long on 8, 16 and 64 devices".format(*ratios) in page
    megabytes = (rows[64]["peak MB"] - rows[2]["peak MB"]) / 62
    assert f"Memory grows by {megabytes:.0f} MB per device" in page


def short(x, digits=3):
    return f"{float(f'{x:.{digits}g}'):,.9g}"


def size(n_bytes):
    return f"{short(n_bytes / 1e9)} GB" if n_bytes >= 1e9 else f"{short(n_bytes / 1e6)} MB"


def line(name, seeds, hours, stored, files, digits=3):
    timed = "under a minute" if hours < 1 / 60 else short(hours, digits)
    # at one digit a rate would contradict the hours
    timed += f" | {short(seeds / hours, digits) if digits > 1 else '-'}"
    return f"| {name} | {seeds:,} | {timed} | {size(stored)} | {files:,} |"


def cycles_line(row):
    chip = f"{row['topology']}, all {row['devices']}" if row["devices"] > 1 else row["topology"]
    memory = row["argument_bytes"] + row["temporary_bytes"]
    stats = {"platform": "tpu", "memory_stats": lambda: None}
    device = SimpleNamespace(device_kind=row["device_kind"], **stats)
    auto = parallel.auto_lanes(device, run_bytes(CONFIG))
    lanes = f"{row['lanes']}, auto" if row["lanes"] == auto else row["lanes"]
    cycles = row["cycles_per_step_and_seed"]
    return f"| {chip} | {lanes} | {row['program']} | {cycles:,.0f} | {memory / 1e6:,.0f} MB |"


def modelled(name, seeds, monkeypatch):
    """Hours, bytes and files, with the lanes and chunks that the package itself would choose."""
    processes, n_devices, kind = MACHINES[name]
    # what JAX may use of an H200's memory; a TPU's is not asked for
    device = SimpleNamespace(**kind, memory_stats=lambda: {"bytes_limit": 105 * 10**9})
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
        lines += [line(name, n, *modelled(name, n, monkeypatch), 1) for n in sizes]
    assert quoted("table") == lines
    assert quoted("cycles") == [cycles_line(row) for row in TPU]
    names = ("report peak MB", "report CPU seconds", "report seconds")
    names += ("check peak MB", "check seconds")
    for each, row in zip(SWEEPS, quoted("measured"), strict=True):
        took = " | ".join(short(each[name]) for name in names)
        stored = size(each["bytes a row"] * each["runs"])
        assert row == f"| {each['runs']:,} | {each['files']:,} | {stored} | {took} |"
    assert max(each[name] for each in SWEEPS for name in names if "MB" in name) < 1000


def test_the_text_quotes_its_numbers():
    text = " ".join(PAGE.split())
    million, fewer = BY_SIZE[1_000_000, 256], BY_SIZE[100_000, 256]
    a_row, a_check = (
        (million[name] - fewer[name]) / 900 for name in ("report peak MB", "check peak MB")
    )
    a_file = 1000 * (SMALL["check seconds"] - LARGE["check seconds"]) / FEWER
    a_merge = 1000 * SMALL["compact seconds"] / SMALL["files"]
    merged = SMALL["bytes a row"] * SMALL["runs"] / SMALL["compact bytes"]
    queue = {each["chunks"]: each["ms a chunk"] for each in CLUSTER["sweeps"]}
    gpu, tpu = (5 * 4 * P / A_SEED[name] * m[0] * m[1] / 1e6 for name, m in MACHINES.items())
    a_gpu, a_tpu = A_SEED.values()
    assert max(queue.values()) < CLUSTER["limit ms"] == 20
    # products of a step: forward, and backward but for the gradient of the pixels
    flop = (6 * P - 2 * 784 * 512) * CONFIG.batch_size
    traffic, tf32, float32, bfloat16 = (
        1e6 * n / rate
        for n, rate in (
            (7 * 4 * P, BANDWIDTH["H200"]),
            (flop, 494e12),
            (flop, 67e12),
            (flop, 197e12),
        )
    )
    mebibytes = {kind: size // 2**20 for kind, size in parallel.VMEM.items()}
    for words in (
        f"{flop / 1e6:.0f} MFLOP per step and seed take {tf32:.1f} of the {traffic:.1f} micro",
        f"they take {float32:.1f}, and an H200 would need {float32 / traffic:.1f} times the hours",
        f"evaluation ({100 * 2 * P * 10_000 / (STEPS / CONFIG.epochs * flop):.0f} % of the arith",
        f"would take {bfloat16:.1f} microseconds in bfloat16",
        f"in the {mebibytes['TPU v5 lite']} MiB of VMEM",
        f"P = {P:,}, S = {STEPS:,} and 7 x 4 P = {7 * 4 * P / 1e6:.2f} MB",
        f"That is {1000 * a_gpu:.0f} ms per seed on an H200",
        f"{CYCLES:,.0f} cycles per seed with the {V5E['lanes']} lanes",
        f"that is {CYCLES / CLOCK * 1e6:.1f} microseconds, and {1000 * a_tpu:.0f} ms for 50 epochs",
        f"would take {7 * 4 * P / BANDWIDTH['v5e'] * 1e6:.1f} microseconds",
        f"{256 * a_gpu:.0f} s on an H200 and {V5E['lanes'] * a_tpu:.1f} s on v5e",
        f"A = {A:.0f} bytes per row and B = {B:,.0f} bytes per file (the record: {STORED:,.0f} per"
        " row",
        f"of {SPEED['environment']['processor']}, {CPU_SECONDS:.1f} s per seed",
        f"{len(SECONDS)} rows took {min(SECONDS):.0f} to {max(SECONDS):,.0f} s",
        f"{million['report peak MB']:.0f} MB for a million runs, {a_row:.2f} KB each",
        f"{a_check:.2f} KB per run, {million['check peak MB']:.0f} MB for a million",
        f"{a_file:.1f} ms per file, hence {500 * a_file / 60:.0f} minutes for 500,000",
        f"merged {SMALL['files']:,} files into {SMALL['compact files']} in {a_merge:.0f} ms per"
        " file",
        f"and the result is {merged:.0f} times smaller",
        f"10,000 chunks took {queue[1_000]:.0f} and {queue[10_000]:.0f} ms per chunk",
        f"{1e6 / 2 * queue[10_000] / 3.6e6:.1f} hours, compared with"
        f" {short(1e6 * CPU_SECONDS / 3600)} hours of training",
        f"{gpu:.0f} MB per second on one H200 and {tpu:,.0f} MB",
    ):
        assert words in text, words
    readme = " ".join((RESULTS.parent / "README.md").read_text().split())
    each = f"{a_tpu:.2f} s per seed for 50 epochs when {V5E['lanes']} seeds train at once"
    each = f"that is, at {CLOCK / 1e9:g} GHz at least {each}"
    assert f"it estimates {CYCLES:,.0f} cycles per step and seed, {each}" in readme
