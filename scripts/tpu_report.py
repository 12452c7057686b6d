"""What the TPU's compiler expects of a training, where there is no TPU: memory and cycles per step.

    pip install '.[tpu]'
    python scripts/tpu_report.py --out results/tpu.json

libtpu compiles for chips that are not there. A row is one program of `keras-sgd`, for one topology
and number of lanes; one lane is the program of `train`. Its cycles are the compiler's own
estimates, added up over the instructions of a training step: no timing, and without the few that it
gives no estimate for, of which fusions and custom calls are listed. Rows that the file has already
are kept, if the same code and versions made them.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

# libtpu looks for a TPU's host otherwise, and waits
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

import mlp_jax as mj
from mlp_jax.files import write_json
from mlp_jax.training import step
from mlp_jax.training.arrays import N_PIXELS, Split
from mlp_jax.training.config import RECIPES, Config
from mlp_jax.training.parallel import Placement, auto_lanes
from mlp_jax.training.programs import current_programs, fingerprint_code, run_bytes

RECIPE = "keras-sgd"
N_TRAIN, N_TEST = 60_000, 10_000
DEAREST = 10
OTHERS = ("tpu7x:2x2x1", "v4:2x2x1", "v3:2x2", "v2:2x2")


@dataclasses.dataclass(frozen=True)
class Args:
    topologies: tuple[str, ...] = ("v5e:1x1", "v5e:2x2", "v6e:1x1", "v5p:2x2x1", *OTHERS)
    """Chips to compile for: all of v5e:2x2, and one of the others."""
    lanes: tuple[int, ...] = (16, 32, 64)
    """Runs a device trains at once, beside what `--lanes auto` takes; for v5e:2x2 that alone."""
    whole: tuple[str, ...] = ("v5e:1x1",)
    """Of these the row of `--lanes auto` is a whole epoch, with its sort and its evaluation."""
    out: Path | None = None
    """File for the rows, as JSON."""


class Instruction(NamedTuple):
    """Of a training step, for all lanes; `cycles` is None where the compiler gives no estimate."""

    name: str
    cycles: int | None
    source: str


def describe_devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of `topology` that a row is about; none of them need exist."""
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    made = topologies.get_topology_desc(topology, "tpu", **bounds)
    return tuple(made.devices) if topology == "v5e:2x2" else tuple(made.devices[:1])


def compile_epoch(config: Config, placement: Placement, *, whole: bool) -> jax.stages.Compiled:
    """The program of an epoch; or of its steps, in an order drawn without a sort, and with a tenth
    of the evaluation: the same step, compiled in a third of the time.
    """
    if whole:
        return current_programs(config, placement, data_shapes(N_TEST)).epoch
    with mock.patch.object(step, "epoch_order", unsorted_order):
        return current_programs(config, placement, data_shapes(step.EVAL_BATCH)).epoch


def data_shapes(n_test: int) -> tuple:
    train, test = (
        Split(jax.ShapeDtypeStruct((n, N_PIXELS), jnp.uint8), jax.ShapeDtypeStruct((n,), jnp.int32))
        for n in (N_TRAIN, n_test)
    )
    return train, test, ()


def unsorted_order(key, epoch, n_train, batch_size):
    """In place of `step.epoch_order`: examples drawn with replacement."""
    order = jax.random.randint(key, (-(-n_train // batch_size), batch_size), 0, n_train)
    return order, (jnp.arange(order.size) < n_train).astype(jnp.float32).reshape(order.shape)


def step_instructions(text: str) -> list[Instruction]:
    """The instructions of the loop over the steps, of the compiled program's `text`, that do
    something: the loop of the program with a gradient in it.
    """
    bodies = "|".join(map(re.escape, set(re.findall(r"body=%([\w.-]+)", text))))
    loops = re.findall(rf"^%(?:{bodies}) .*?^}}", text, re.DOTALL | re.MULTILINE)
    (loop,) = (each for each in loops if "transpose(jvp(MLP))" in each)
    found = []
    for line in loop.splitlines():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles or " fusion(" in line or " custom-call(" in line:
            name, source = (
                re.match(r"\s*(?:ROOT )?%(\S+)", line),
                re.search(r'op_name="(.*?)"', line),
            )
            source = source[1].partition("while/body/")[2] if source else ""
            found.append(Instruction(name[1], int(cycles[1]) if cycles else None, source))
    return found


def report(topology: str, lanes: int, *, whole: bool) -> dict:
    """The row of one program; its cycles and instructions are those of one device."""
    devices = describe_devices(topology)
    compiled = compile_epoch(RECIPES[RECIPE], Placement(devices, lanes), whole=whole)
    instructions = step_instructions(compiled.as_text())
    known = [each for each in instructions if each.cycles is not None]
    memory = compiled.memory_analysis()
    return {
        "command": shlex.join(["python", "scripts/tpu_report.py", *sys.argv[1:]]),
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "lanes": lanes,
        "program": "whole" if whole else "steps",
        "cycles_per_step_and_seed": sum(each.cycles for each in known) / lanes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "dearest": sorted(known, key=lambda each: -each.cycles)[:DEAREST],
        "without an estimate": [each for each in instructions if each.cycles is None],
    }


def choose_lanes(device_kind: str) -> int:
    """What `--lanes auto` takes for many seeds of the recipe."""
    # a device that is not there has no memory to ask for
    real = SimpleNamespace(platform="tpu", device_kind=device_kind, memory_stats=lambda: None)
    return auto_lanes(real, run_bytes(RECIPES[RECIPE]))


def main(args: Args) -> None:
    rows = kept_rows(args.out) if args.out and args.out.exists() else {}
    for topology in args.topologies:
        auto = choose_lanes(describe_devices(topology)[0].device_kind)
        for lanes in sorted({auto, *(args.lanes if topology != "v5e:2x2" else ())}):
            if (topology, lanes) in rows:
                continue
            row = report(topology, lanes, whole=lanes == auto and topology in args.whole)
            rows[topology, lanes] = row
            cycles, size = row["cycles_per_step_and_seed"], row["temporary_bytes"] / 1e6
            print(f"{topology} {lanes} lanes: {cycles:,.0f} cycles, {size:.0f} MB", flush=True)
            if args.out:
                write_json(args.out, to_record(rows))


def kept_rows(path: Path) -> dict:
    """The rows of an earlier record, by topology and lanes; exits if they are of other code."""
    before, now = json.loads(path.read_text()), to_record({})
    names = ("versions", "compiler_options", "xla_flags", "library_flags", "matmul_precision")
    made_by = [[each["program"], *map(each["environment"].get, names)] for each in (before, now)]
    if made_by[0] != made_by[1]:
        sys.exit(f"error: {path} was made by other code, versions or flags: name another --out")
    return {(row["topology"], row["lanes"]): row for row in before["rows"]}


def to_record(rows: dict) -> dict:
    environment = mj.describe_environment()
    environment["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    return {
        "what": "estimates of the TPU's compiler, without a TPU: nothing was timed",
        "recipe": RECIPE,
        "program": fingerprint_code(RECIPES[RECIPE], data_shapes(N_TEST)),
        "environment": environment,
        "rows": [rows[key] for key in sorted(rows)],
    }


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
