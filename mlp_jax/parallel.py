"""Lifts a function of one run to many runs: devices x lanes.

On CPU a device trains one run after another (`lax.map`), so that a row of many runs is the single
run bit for bit; on GPU and TPU the lanes of a device are vmapped.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_jax.config import UserError

RUNS = "runs"

MAX_AUTO_LANES = 256
"""Past some hundred lanes the traffic of the weights sets the speed, and more lanes gain nothing."""


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


def use_cores() -> None:
    """Split JAX's CPU backend into one device a core; call it before anything else asks JAX."""
    jax.config.update("jax_num_cpu_devices", n_cores())


def n_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def place(n_runs: int, run_bytes: int, *, devices: int | None, lanes: int | None) -> Placement:
    """Where to train `n_runs`, each of which needs `run_bytes` of memory while it trains.

    By default all local devices, and the lanes of the module's docstring. UserError where more
    devices are asked for than there are.
    """
    local = jax.local_devices()
    if devices is not None and devices > len(local):
        raise UserError(f"--devices {devices}: there are {len(local)} ({local[0].device_kind})")
    chosen = tuple(local[: min(devices or len(local), n_runs)])
    if lanes is None and chosen[0].platform == "cpu":
        lanes = 1
    elif lanes is None:
        memory = (chosen[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30)
        lanes = min(MAX_AUTO_LANES, memory // 2 // run_bytes, math.ceil(n_runs / len(chosen)))
    return Placement(chosen, max(1, lanes))


def map_runs(fn: Callable, placement: Placement) -> Callable:
    """Lift `fn(*run, shared)` to arguments whose leaves have a leading axis of runs.

    That axis must be a multiple of the number of devices, and the results carry it too; `shared`
    is the same for all runs and held once a device. Pure: the caller jits.
    """

    def one_device(runs, shared):
        lanes = None if placement.lanes == 1 else placement.lanes
        return lax.map(lambda run: fn(*run, shared), runs, batch_size=lanes)

    sharded = jax.shard_map(
        one_device,
        mesh=placement.mesh,
        in_specs=(P(RUNS), P()),
        out_specs=P(RUNS),
        # the scans inside start from constants, which the check takes for replicated values
        check_vma=False,
    )
    return lambda *args: sharded(args[:-1], args[-1])


def replicate(tree, placement: Placement):
    """The arrays of `tree`, held once on each device of the placement."""
    return jax.device_put(tree, NamedSharding(placement.mesh, P()))


def shard(tree, placement: Placement):
    """The arrays of `tree`, their leading axis divided over the devices of the placement."""
    return jax.device_put(tree, NamedSharding(placement.mesh, P(RUNS)))
