"""Trains runs on the devices of this machine, and writes nothing."""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter as clock
from typing import Literal, NamedTuple

import jax

from mlp_jax.records.provenance import Metadata, describe_environment
from mlp_jax.training.arrays import Dataset
from mlp_jax.training.fit import (
    Progress,
    Snapshot,
    compile_programs,
    fit,
    program_text,
    run_bytes,
)
from mlp_jax.training.parallel import Placement, place
from mlp_jax.training.run import Run


class Epoch(NamedTuple):
    """Some runs after an epoch, and the wall time of each of their epochs in seconds."""

    progress: Progress
    seconds: list[float]
    params: dict | None = None  # of finished runs if wanted, NumPy arrays [runs, ...]
    new: int = 1  # epochs since these runs were last yielded
    nodes: int = 1  # machines that train


class Machine(NamedTuple):
    """Devices that hold a data set, and the metadata of what they train."""

    metadata: Metadata
    dataset: Dataset
    placement: Placement


def prepare(
    metadata: Metadata,
    dataset: Dataset,
    n_runs: int,
    devices: Literal["auto"] | int = "auto",
    lanes: Literal["auto"] | int = "auto",
) -> Machine:
    """Put `dataset` on the local devices that train `n_runs`, and these into `metadata`."""
    placement = place(n_runs, run_bytes(metadata.config), devices=devices, lanes=lanes)
    environment = describe_environment(placement.devices) | {"lanes": placement.lanes}
    train, test = jax.device_put((dataset.train, dataset.test), placement.replicated)
    dataset = dataset._replace(train=train, test=test)
    return Machine(metadata._replace(environment=environment), dataset, placement)


def compiled(machine: Machine) -> Machine:
    """Compile the programs of `machine`; its metadata gain the fingerprint of their code."""
    (metadata, dataset, placement), sizes = machine, _sizes(machine.dataset)
    with ThreadPoolExecutor(max_workers=1) as beside:
        compiling = beside.submit(compile_programs, metadata.config, placement, *sizes)
        metadata = with_program(metadata, dataset)  # while XLA compiles
        compiling.result()
    _trim_memory()
    return machine._replace(metadata=metadata)


def train_group(
    machine: Machine,
    runs: Sequence[Run],
    start: Snapshot | None = None,
    seconds: Sequence[float] = (),
) -> Iterator[Epoch]:
    """Train as many runs as the devices hold, from a checkpoint if there is one."""
    (metadata, dataset, placement), seconds = machine, list(seconds)
    began = clock()
    for progress in fit(metadata.config, dataset, runs, placement=placement, start=start):
        seconds.append(clock() - began)
        yield Epoch(progress, seconds)
        began = clock()


def finish(epoch: Epoch, keep_weights: bool) -> Epoch:
    """`epoch` with all that is stored of it, and nothing on the devices."""
    params = epoch.progress.params if keep_weights else None
    return epoch._replace(progress=epoch.progress._replace(states=[]), params=params)


def with_program(metadata: Metadata, dataset: Dataset) -> Metadata:
    """`metadata` with the fingerprint of the training code."""
    if metadata.program:
        return metadata
    text = program_text(metadata.config, *_sizes(dataset))
    return metadata._replace(program=hashlib.sha256(text.encode()).hexdigest())


def _sizes(dataset: Dataset) -> tuple[int, int]:
    return len(dataset.train.labels), len(dataset.test.labels)


def _trim_memory() -> None:
    """Return the hundred MB that the compiler freed and glibc would keep."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def split(runs: Sequence[Run], size: int) -> Iterator[Sequence[Run]]:
    return (runs[start : start + size] for start in range(0, len(runs), size))
