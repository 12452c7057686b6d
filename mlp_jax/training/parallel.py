"""Lifts a function of one run to many runs: devices x lanes.

Runs train in groups. On CPU a group is one run per device, so that each equals the single run bit
for bit; on GPU and TPU it is `auto_lanes` vmapped runs per device. Groups go through one program,
one after another.
"""

import functools
import json
import math
import operator
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_jax.errors import UserError, one_line

RUNS = "runs"

MAX_AUTO_LANES = 256
"""Calculated for GPUs, not measured: past some hundred lanes, weight traffic limits the speed, and
more lanes gain nothing."""

VMEM = {
    **{kind: 16 * 2**20 for kind in ("TPU v2", "TPU v3", "TPU v4")},
    **{"TPU v5": 64 * 2**20, "TPU v5 lite": 128 * 2**20, "TPU v6 lite": 128 * 2**20},
    "TPU7x": 64 * 2**20,
}
"""Bytes of a TPU core's vector memory by `device_kind`, from jax.experimental.pallas.tpu."""


class RunBytes(NamedTuple):
    """Device memory of a run: its state, and roughly the total while it trains."""

    state: int
    total: int


class Placement(NamedTuple):
    """The local devices that train, and how many runs each of them vmaps (1: no vmap)."""

    devices: tuple[jax.Device, ...]
    lanes: int

    @property
    def width(self) -> int:
        """Runs that train at the same time."""
        return len(self.devices) * self.lanes

    @property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (RUNS,))

    @property
    def run_sharding(self) -> NamedSharding:
        """Sharding of arrays [width, ...]: a share of the runs on each device."""
        return NamedSharding(self.mesh, P(RUNS))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of arrays common to all runs: a copy on each device."""
        return NamedSharding(self.mesh, P())


def use_cores(cores: int | None = None) -> bool:
    """Split JAX's CPU backend into one device per core; False if JAX has its devices already.

    Without a number, one that was set before stays. More than there are cores change roundings.
    """
    if cores is not None and operator.index(cores) < 1:
        raise UserError(f"use_cores needs at least one core, not {cores}")
    before = jax.config.values["jax_num_cpu_devices"]
    try:
        number = cores or (before if before > 0 else n_cores())
        jax.config.update("jax_num_cpu_devices", int(number))
    except RuntimeError:
        return False
    return True


COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # runs once, for milliseconds, but takes a second to optimise
    "init": {"xla_backend_optimization_level": 0},
    # without it XLA's CPU backend copies two of the kernels in every step
    "epoch, cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
}
"""Those that mlp_jax itself gives to XLA, by program."""


MEANS_DEFAULT = {None: "default", "default": "default, by name"}
"""The second is traced to another program, which computes the same."""


def numerics() -> dict[str, Any]:
    """Settings of JAX and XLA that change numbers, by the names that records give them."""
    values = jax.config.values
    precision = values["jax_default_matmul_precision"]
    return {
        "prng": values["jax_default_prng_impl"],
        "matmul_precision": MEANS_DEFAULT.get(precision, precision),
        "x64": values["jax_enable_x64"],
        "threefry_partitionable": values["jax_threefry_partitionable"],
        "random_seed_offset": values["jax_random_seed_offset"],
        "disable_most_optimizations": values["jax_disable_most_optimizations"],
        "compiler_options": json.dumps(COMPILER_OPTIONS),
    }


def n_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def place(
    n_runs: int,
    run_bytes: RunBytes,
    *,
    devices: Literal["auto"] | int = "auto",
    lanes: Literal["auto"] | int = "auto",
) -> Placement:
    """Where to train `n_runs`, each of which needs `run_bytes` of memory.

    "auto": all local devices, and `auto_lanes`. UserError if there are no devices, or fewer than
    asked for.
    """
    for name, count in (("devices", devices), ("lanes", lanes)):
        if count != "auto" and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}")
    try:
        local = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"] or "any"
        raise UserError(f"JAX finds no device (platforms: {asked}): {one_line(error)}") from error
    if devices == "auto":
        devices = len(local)
    if devices > len(local):
        raise UserError(f"devices {devices}: only {len(local)} here ({local[0].device_kind})")
    chosen = tuple(local[: min(devices, n_runs)])
    if lanes == "auto":
        lanes = auto_lanes(chosen[0], run_bytes)
    # more lanes than runs would train padding
    return Placement(chosen, max(1, min(lanes, math.ceil(n_runs / len(chosen)))))


def auto_lanes(device: jax.Device, run_bytes: RunBytes) -> int:
    """Lanes for training many runs: 1 on CPU, elsewhere at most what half the memory holds.

    On a TPU, states stay in vector memory from step to step if they fill at most two thirds of it
    (the rest is for gradients and activations), so that sets the lanes, in multiples of 8, the rows
    of a tile. If it allows fewer than 32, a step's fixed costs outweigh the states' traffic to main
    memory, and 64 lanes share them (results/scaling.md). On a GPU the nearest large memory, L2,
    holds too few: 18 states of the default network in an H100's 50 MB. Its fixed costs, kernel
    launches, call for as many lanes as main memory can feed.
    """
    if device.platform == "cpu":
        return 1
    memory = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    most = min(MAX_AUTO_LANES, memory // 2 // run_bytes.total)
    if device.platform != "tpu":
        return most
    near = VMEM.get(device.device_kind, 0) * 2 // 3 // run_bytes.state // 8 * 8
    return min(most, near if near >= 32 else 64)


def map_runs(fn: Callable, placement: Placement) -> Callable:
    """Lift `fn(state, run, shared) -> (state, result)` from one run to a group that trains at once.

    Leaves of states, runs and results become [width, ...]; `shared` is held once per device. Pure:
    the caller jits.
    """

    def one_device(states, runs, shared):
        if placement.lanes > 1:
            return jax.vmap(lambda state, run: fn(state, run, shared))(states, runs)
        # not a vmap over one: that would be another program, with other roundings
        one = fn(*jax.tree.map(lambda leaf: leaf[0], (states, runs)), shared)
        return jax.tree.map(lambda leaf: leaf[None], one)

    return jax.shard_map(
        one_device,
        mesh=placement.mesh,
        in_specs=(P(RUNS), P(RUNS), P()),
        out_specs=P(RUNS),
        # the loops inside start from constants, which the check takes for replicated values
        check_vma=False,
    )


def to_groups(tree, placement: Placement) -> list:
    """Arrays [runs, ...] as a list of groups [width, ...] on the devices; zeros fill the last."""
    width = placement.width

    def group(start: int, leaf):
        rows = leaf[start : start + width]
        return np.pad(rows, [(0, width - len(rows)), *[(0, 0)] * (leaf.ndim - 1)])

    starts = range(0, len(jax.tree.leaves(tree)[0]), width)
    groups = (jax.tree.map(functools.partial(group, start), tree) for start in starts)
    return [jax.device_put(group, placement.run_sharding) for group in groups]


def from_groups(groups: list, n_runs: int):
    """The inverse of `to_groups`, on the host: NumPy arrays [n_runs, ...]."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n_runs], *groups)
