"""Trains chunks of runs on the nodes of a Ray cluster; the caller alone writes what they return.

A chunk is a task in Ray's queue: nodes that join take tasks, and the tasks of a node that dies
are repeated on others. On CPU the numbers are those of one machine, bit for bit.
"""

import contextlib
import functools
import itertools
import logging
import os
import pickle
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import jax

from mlp_jax.errors import UserError, one_line
from mlp_jax.machine import Epoch, Machine, chunks_of, prepare, with_program
from mlp_jax.records.provenance import VERSIONS, Metadata, check_same, version
from mlp_jax.training.arrays import Dataset
from mlp_jax.training.parallel import use_cores

try:
    import ray
except ImportError:
    raise UserError("--ray needs Ray: pip install 'mlp_jax[ray]'") from None

QUEUE = 256  # tasks that Ray knows at a time; nodes that could run more would idle
# JAX keeps the first that it sees
_gpus = functools.cache(functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES"))


@contextlib.contextmanager
def connect(address: str, devices: Literal["auto"] | int = "auto") -> Iterator["Cluster"]:
    """The running cluster at `address` ("auto": this machine's); UserError if there is none."""
    jax.config.update("jax_platforms", "cpu")  # accelerators here belong to this node's worker
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--ray {address}: {one_line(error)}: see `ray start`") from None
    try:
        yield Cluster(devices)
    finally:
        ray.shutdown()


class Cluster:
    """The cluster to which this process is connected."""

    def __init__(self, devices: Literal["auto"] | int):
        """A task takes `devices` of a node; "auto": a GPU, else what the smallest node has."""
        kinds = {kind: self._counts(kind) for kind in ("GPU", "TPU", "CPU")}
        self._kind = next((kind for kind, counts in kinds.items() if counts), "CPU")
        counts = kinds[self._kind]
        auto = 1 if self._kind == "GPU" else min(counts, default=0)
        self._share = auto if devices == "auto" else devices
        if not 0 < self._share <= max(counts, default=0):
            raise UserError(f"no node of the Ray cluster has {self._share or 'any'} {self._kind}s")
        own: Any = {"resources": {"TPU": self._share}}  # Ray has no num_tpus
        own = own if self._kind == "TPU" else {f"num_{self._kind.lower()}s": self._share}
        self._versions = {name: version(name) for name in ("mlp_jax", *VERSIONS)}
        # max_calls: Ray would end a process that has a GPU, and its programs and data, after a task
        self._task = ray.remote(max_retries=-1, max_calls=0, **own)(_task)

    def _counts(self, kind: str) -> list[int]:
        """Devices of each node that has some of a kind."""
        counts = (node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
        return [int(count) for count in counts if count]

    def prepare(self, metadata: Metadata, dataset: Dataset, n_runs: int, lanes) -> tuple:
        """Give tasks `dataset`; returns a node's `metadata`, and the runs it trains at once."""
        cores = self._share if self._kind == "CPU" else None
        self._job = ray.put((metadata, dataset, n_runs, lanes, cores))
        here, width, _ = _get(self._submit((), None, False))
        return here._replace(program=with_program(metadata, dataset).program), width

    def _submit(self, *chunk):
        # in bytes, since another version may not be able to read them
        return self._task.remote(self._versions, [self._job], pickle.dumps(chunk))

    def train(self, chunks, experiment, stop) -> Iterator[tuple[list[Epoch], Metadata]]:
        """Finished chunks in any order, each with its node's metadata, until `stop()`."""
        pending: list = []
        metadata, keep_weights = experiment.metadata, experiment.keep_weights
        submitted = (self._submit(runs, metadata, keep_weights) for runs in chunks)
        while pending := pending + list(itertools.islice(submitted, QUEUE - len(pending))):
            done, pending = ray.wait(pending, timeout=1)  # so that a stop is noticed
            for here, _, ended in map(_get, done):
                nodes = sum(count >= self._share for count in self._counts(self._kind))
                trained = {"n_new": metadata.config.n_epochs, "nodes": nodes}
                yield [each._replace(**trained) for each in ended], here
            if stop():
                return


def _get(task) -> tuple[Metadata, int, list[Epoch]]:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _task(there: dict, job: list, chunk: bytes) -> tuple[Metadata, int, list[Epoch]]:
    """Train a chunk on a node: its metadata, how many runs it trains at once, finished runs.

    UserError, naming the node, if its numbers could differ.
    """
    try:
        for name, asked in there.items():
            if (here := version(name)) != asked:
                raise UserError(f"{name} is {here}, but {asked} where the sweep was started")
        if _gpus() != os.getenv("CUDA_VISIBLE_DEVICES"):
            os._exit(1)  # Ray repeats the task in a new process
        machine = _machine(*job)
        runs, asked, keep_weights = pickle.loads(chunk)
        if asked:
            check_same("the sweep", asked, machine.metadata)
    except UserError as error:
        raise UserError(f"node {ray.util.get_node_ip_address()}: {error}") from None
    width, ended = machine.placement.width, []
    for group in chunks_of(runs, width):
        (last,) = deque(machine.train(group), maxlen=1)
        ended.append(last.finish(keep_weights))
    return machine.metadata, width, ended


@functools.lru_cache(maxsize=1)
def _machine(job: Any) -> Machine:
    """What this process trains with, kept from task to task."""
    metadata, dataset, n_runs, lanes, cores = ray.get(job)
    use_cores(cores)
    return prepare(metadata, dataset, n_runs, lanes=lanes).compile()
