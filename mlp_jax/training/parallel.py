"""Lifts a function of one run to many runs: devices x lanes.

Runs train in groups: of one run per device on CPU, so that a row of many runs is the single run bit
for bit; of the lanes that `auto_lanes` chooses, vmapped, on GPU and TPU. The groups go through one
program, one after another.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_jax.errors import UserError, one_line

RUNS = "runs"

MAX_AUTO_LANES = 256
"""By arithmetic, not by measurement: past some hundred lanes, weight traffic limits the
speed, and more lanes gain nothing."""

VMEM = {
    **{kind: 16 * 2**20 for kind in ("TPU v2", "TPU v3", "TPU v4")},
    **{"TPU v5": 64 * 2**20, "TPU v5 lite": 128 * 2**20, "TPU v6 lite": 128 * 2**20},
}
"""Bytes of a TPU core's vector memory by `device_kind`, as jax.experimental.pallas.tpu has them."""


class RunBytes(NamedTuple):
    """Device memory of a run: its state, and roughly all that it takes while it trains."""

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
    def one_run_a_place(self) -> NamedSharding:
        """Of arrays [width, ...]: a share of the runs on each device."""
        return NamedSharding(self.mesh, P(RUNS))

    @property
    def replicated(self) -> NamedSharding:
        """Of arrays that all runs share: a copy on each device."""
        return NamedSharding(self.mesh, P())


def use_cores() -> bool:
    """Split JAX's CPU backend into one device per core; False if JAX has its devices already."""
    try:
        jax.config.update("jax_num_cpu_devices", n_cores())
    except RuntimeError:
        return False
    return True


def n_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
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
    try:
        local = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"] or "any"
        raise UserError(f"JAX finds no device (platforms: {asked}): {one_line(error)}") from error
    if devices == "auto":
        devices = len(local)
    if devices > len(local):
        raise UserError(f"--devices {devices}: there are {len(local)} ({local[0].device_kind})")
    chosen = tuple(local[: min(devices, n_runs)])
    if lanes == "auto":
        lanes = auto_lanes(chosen[0], run_bytes)
    # more lanes than runs would train padding
    return Placement(chosen, max(1, min(lanes, math.ceil(n_runs / len(chosen)))))


def auto_lanes(device: jax.Device, run_bytes: RunBytes) -> int:
    """The lanes to train many runs with: on CPU 1, elsewhere at most what half the memory holds.

    A TPU's states stay in its vector memory from step to step if they fill at most two thirds of
    it; the rest is for gradients and activations. So as many as that, in eights, the rows of a
    tile. Where those are fewer than 32, a step's fixed costs weigh more than the states' way
    through the main memory, and 64 share them (results/scaling.md). A GPU's nearest large memory,
    its L2, holds too few: 18 states of the default net in an H100's 50 MB. Its fixed costs, the
    starts of kernels, ask for as many lanes as the main memory can feed.
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
    """Lift `fn(state, run, shared) -> (state, result)` of one run to a group of them, which train
    at the same time: the leaves of states, runs and results are [width, ...].

    `shared` is the same for all runs and held once a device. Pure: the caller jits.
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
        # the scans inside start from constants, which the check takes for replicated values
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
    return [jax.device_put(group, placement.one_run_a_place) for group in groups]


def from_groups(groups: list, n_runs: int):
    """The inverse of `to_groups`, on the host: NumPy arrays [n_runs, ...]."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n_runs], *groups)
