"""Trains runs on the devices of this machine, and writes nothing."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from time import perf_counter as clock
from typing import NamedTuple

import jax

from mlp_jax.records.provenance import Metadata, describe_environment
from mlp_jax.training.arrays import Dataset
from mlp_jax.training.fit import Progress, fit
from mlp_jax.training.parallel import Placement, place
from mlp_jax.training.programs import Programs, current_programs, fingerprint_code, run_bytes
from mlp_jax.training.run import Run


class Epoch(NamedTuple):
    """Some runs after an epoch, and the wall time of each of their epochs in seconds."""

    progress: Progress
    seconds: list[float]
    params: dict | None = None  # of finished runs if wanted, NumPy arrays [runs, ...]
    n_new: int = 1  # epochs since these runs were last yielded
    nodes: int = 1  # machines that train

    def finish(self, keep_weights: bool) -> "Epoch":
        """A copy to store: with the weights, if wanted, and without what is on the devices."""
        params = self.progress.fetch_params() if keep_weights else None
        return self._replace(progress=self.progress._replace(states=[]), params=params)


class Machine(NamedTuple):
    """Devices that hold a data set, and the metadata of what they train; made by `prepare`."""

    metadata: Metadata
    dataset: Dataset
    placement: Placement
    programs: Programs | None = None

    def compile(self) -> "Machine":
        """Compile the programs; the metadata gain the fingerprint of their code."""
        metadata, dataset, placement, _ = self
        programs = current_programs(metadata.config, placement, dataset.arrays)
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # a hundred MB that glibc would keep
        metadata = metadata._replace(program=programs.fingerprint)
        return self._replace(metadata=metadata, programs=programs)

    def train(self, runs: Sequence[Run], saved: tuple | None = None) -> Iterator[Epoch]:
        """Train as many runs as the devices hold, from what `load_checkpoint` gave."""
        metadata, dataset, placement, programs = self
        start, seconds = saved or (None, [])
        options = {"placement": placement, "start": start, "programs": programs}
        began = clock()
        for progress in fit(metadata.config, dataset, runs, **options):
            seconds.append(clock() - began)
            yield Epoch(progress, seconds)
            began = clock()


def prepare(metadata: Metadata, dataset: Dataset, n_runs: int, **options) -> Machine:
    """Put `dataset` on the devices that `parallel.place` gives, and these into `metadata`."""
    placement = place(n_runs, run_bytes(metadata.config), **options)
    environment = describe_environment(placement.devices) | {"lanes": placement.lanes}
    train, test, params = jax.device_put(dataset.arrays, placement.replicated)
    teacher = dataset.teacher and dataset.teacher._replace(params=params)
    dataset = dataset._replace(train=train, test=test, teacher=teacher)
    return Machine(metadata._replace(environment=environment), dataset, placement)


def with_program(metadata: Metadata, dataset: Dataset) -> Metadata:
    """`metadata` with the fingerprint of the training code."""
    if metadata.program:
        return metadata
    return metadata._replace(program=fingerprint_code(metadata.config, dataset.arrays))


def chunks_of(runs: Sequence[Run], size: int) -> Iterator[Sequence[Run]]:
    return (runs[start : start + size] for start in range(0, len(runs), size))
