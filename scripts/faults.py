"""Kills, full disks and flipped bits: what runs and sweeps lose to them, counted.

    python scripts/faults.py --out results/faults.json     hours on two cores; resumes what is there
    python scripts/faults.py --kills 2 --others 0          a short version

A trial disrupts a command, its environment, or files that it left, runs the same command again, and
compares all its numbers with those of an undisturbed command. It counts as lost if the numbers
differ, if the command fails, or if something that must be refused is not. Moments, files and bits
are drawn from --seed. The disk faults mount disks, which needs root on Linux; those of `--ray` need
Ray, and run its nodes on this machine.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from benchmark import fresh

import mlp_jax as mj
from mlp_jax.data.dataset import CACHE
from mlp_jax.files import load_arrays, save_arrays, write_json

# a net that trains in seconds: only files and moments matter here
SETTINGS = ["--hidden", "32", "--epochs", "16", "--checkpoint-every", "3", "--quiet"]
SWEEP = [*SETTINGS, "--seeds", "0:6", "--chunk", "2"]
COMMANDS = {"train": SETTINGS, "sweep": SWEEP, "sweep --ray": SWEEP}
SHORT = ["--recipe", "short", "--seeds", "0:100", "--quiet"]
PROMPT = 10  # seconds from a signal to the end; machines that are taken away give 30
PACKAGE = Path(mj.__file__).parent
ROOM = "200M"  # on a mounted disk that is not full
# of a core each; their object stores have room for the data, 55 MB, and little more
NODES, NODE = 3, {"num_cpus": 1, "object_store_memory": 80 * 2**20}
TIMEOUT = 600


@dataclasses.dataclass(frozen=True)
class Args:
    kills: int = 100
    """Trials of kill -9, and of Ray nodes killed; shared among the commands."""
    others: int = 30
    """Trials of each other fault; shared among the commands that it can disturb."""
    commands: tuple[Literal[*COMMANDS], ...] = tuple(COMMANDS)
    """Commands to disturb."""
    seed: int = 0
    """Decides the moments, files and bits."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """File for the table, as JSON."""


class Lost(Exception):
    """A command failed, or ended with other numbers."""


@dataclasses.dataclass
class Job:
    """A command whose results go to `out`, and what it leaves if nothing disturbs it."""

    front: str
    out: Path
    data_dir: Path
    cluster: Any = None  # of Ray
    numbers: list | None = None
    seconds: float = 0.0  # from config.json to the end

    def start(self, *flags: str, **env: str) -> subprocess.Popen:
        if self.front == "train" and "--overwrite" not in flags:
            flags += ("--resume",)
        if self.cluster:
            flags += ("--ray", self.cluster.address)
        return self.run(*COMMANDS[self.front], *flags, "--out", str(self.out), **env)

    def run(self, *flags: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"mlp_jax.{self.front.split()[0]}", *flags]
        command += ["--data-dir", str(self.data_dir)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # not where a checkout lies: `python -m` would prefer it to PYTHONPATH
        return subprocess.Popen(
            command, **pipes, text=True, env=os.environ | env, cwd=self.data_dir
        )

    def saved(self) -> bool:
        """Whether there is something that other numbers could be mixed with."""
        return any(self.out.glob("checkpoints/*.npz")) or any(self.out.glob("runs/*.parquet"))

    def begun(self) -> bool:
        return (self.out / "config.json").exists()

    def results(self) -> list:
        """All numbers that the command left, except times."""
        rows = mj.read_runs(self.out).drop_columns("seconds").to_pylist()
        if self.front != "train":
            return rows
        lines = map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines())
        correct = json.loads((self.out / "summary.json").read_text())["test_correct"]
        layers = mj.load_run(self.out).params.values()
        weights = [array.tobytes() for layer in layers for array in layer.values()]
        return [*rows, *(line | {"seconds": None} for line in lines), correct, *weights]

    def check(self) -> None:
        """Run it to its end and compare its results; raises Lost."""
        ended_well(self.start())
        if self.results() != self.numbers:
            raise Lost("other numbers")


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr; raises Lost at a traceback."""
    try:
        said = process.communicate(timeout=TIMEOUT)[1].strip().splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        raise Lost(f"no end after {TIMEOUT} s: {process.communicate()[1][-200:]!r}") from None
    if any(line.startswith("Traceback") for line in said):
        raise Lost(f"a traceback: {said[-1]}")
    return process.returncode, said


def ended_well(process: subprocess.Popen) -> None:
    status, said = ended(process)
    if status:
        raise Lost(f"status {status}: {said[-1:]}")


def wait_for(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Return once `happened()` is true or the process has ended."""
    while not happened() and process.poll() is None:
        time.sleep(0.01)


def stop(job: Job, rng, number: signal.Signals, after: Callable[[], object] | None = None) -> bool:
    """Send a signal at a random moment of the work, or in a quarter of its time after `after()`."""
    process = job.start()
    wait_for(process, after or job.begun)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(0, job.seconds / (4 if after else 1)))
    harmed = process.poll() is None
    process.send_signal(number)
    status, said = ended(process)
    if harmed and number != signal.SIGKILL:
        # 0 if everything was trained when the signal came
        if status not in (0, 128 + number):
            raise Lost(f"status {status} after {number.name}: {said[-1:]}")
        if status and not any("resume with: " in line for line in said):
            raise Lost(f"does not say how to resume: {said[-1:]}")
    return harmed


def killed(job: Job, rng) -> bool:
    return stop(job, rng, signal.SIGKILL)


def asked_to_stop(job: Job, rng) -> bool:
    return stop(job, rng, (signal.SIGINT, signal.SIGTERM)[rng.integers(2)])


def damaged(job: Job, rng, pattern: str) -> bool:
    """Flip a bit of a file that a killed command left, or cut off its end."""

    def files() -> list[Path]:
        try:
            return sorted(path for path in job.out.glob(pattern) if path.stat().st_size)
        except FileNotFoundError:  # renamed at this moment
            return []

    stop(job, rng, signal.SIGKILL, after=files)
    found = [path for path in files() if path.is_file()]
    if found:
        spoil(found[rng.integers(len(found))], rng)
    return bool(found)


def spoil(path: Path, rng) -> None:
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    else:
        content = content[: rng.integers(len(content))]
    path.write_bytes(content)


def damaged_cache(job: Job, rng) -> bool:
    (cache,) = job.data_dir.rglob(CACHE)
    spoil(cache, rng)
    return True


def refused(job: Job, word: str, *flags: str, **env: str) -> None:
    """Run a command that must end in one line and change nothing; raises Lost."""
    before = content(job.out)
    status, said = ended(job.start(*flags, **env))
    if status == 0 or len(said) != 1 or word not in said[0]:
        raise Lost(f"status {status}, not refused: {said[-1:]}")
    if content(job.out) != before:
        raise Lost("refused, but something was written")


def content(directory: Path) -> dict[Path, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith(".")}


def foreign_directory(job: Job, rng) -> bool:
    """Another project's directory, with a config.json of any kind."""
    configs = [b"model: bert\n", b'{"model": "bert"}', b'{"sha256": "0", "model": 1}', b"\xff{"]
    (job.out / "checkpoints").mkdir(parents=True)
    for name in ("model.bin", "summary.json", "metrics.jsonl", "checkpoints/1.npz"):
        (job.out / name).write_bytes(rng.bytes(100))
    (job.out / "config.json").write_bytes(configs[rng.integers(4)])
    overwrite = job.front == "train" and rng.random() < 0.5
    refused(job, "was not written by mlp_jax", *(["--overwrite"] if overwrite else []))
    shutil.rmtree(job.out)
    return True


NUMERICS = [
    {"JAX_THREEFRY_PARTITIONABLE": "0"},
    {"JAX_RANDOM_SEED_OFFSET": "7"},
    {"JAX_ENABLE_X64": "1"},
    {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
]


def other_numerics(job: Job, rng) -> bool:
    stop(job, rng, signal.SIGKILL, after=job.saved)
    refused(job, "was trained with", **NUMERICS[rng.integers(len(NUMERICS))])
    return True


EDITS = [
    ("training/optim.py", '"sgd": optax.identity', '"sgd": lambda: optax.trace(decay=0.5)'),
    ("training/model.py", "/ 255", "/ 256"),
    ("training/step.py", "fold_in(key, state.step)", "fold_in(key, state.step + 1)"),
    ("training/losses.py", "jnp.sum(batch.mask)", "batch.mask.size"),
]


def edited_code(job: Job, rng) -> bool:
    stop(job, rng, signal.SIGKILL, after=job.saved)
    with edited_package(rng) as scratch:
        refused(job, "different training code", PYTHONPATH=scratch)
    return True


@contextlib.contextmanager
def edited_package(rng):
    """A directory of the package with one line of the training changed."""
    name, old, new = EDITS[rng.integers(len(EDITS))]
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(PACKAGE, Path(scratch, "mlp_jax"))
        path = Path(scratch, "mlp_jax", name)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        yield scratch


def other_labels(job: Job, rng) -> bool:
    """A data cache that is intact, but whose test labels are others."""
    (cache,) = job.data_dir.rglob(CACHE)
    before = cache.read_bytes()
    arrays, about = load_arrays(cache)
    arrays["test_labels"] = rng.permutation(arrays["test_labels"])
    save_arrays(cache, arrays, about)
    stop(job, rng, signal.SIGKILL)
    refused(job, "MNIST as it was published")
    cache.write_bytes(before)
    return True


FAILING_DISK = """
import os, pathlib
read_bytes = pathlib.Path.read_bytes
def fail(self):
    if self.match(os.environ["FAIL_TO_READ"]):
        raise OSError(5, "Input/output error", str(self))
    return read_bytes(self)
pathlib.Path.read_bytes = fail
"""


def unreadable_file(job: Job, rng) -> bool:
    """A disk that fails to read one kind of the files that a killed command left."""
    kinds = {"checkpoints/*.npz": "*/checkpoints/*.npz", "runs/*.parquet": "*/runs/*.parquet"}
    stop(job, rng, signal.SIGKILL, after=job.saved)
    there = [pattern for kind, pattern in kinds.items() if any(job.out.glob(kind))]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "sitecustomize.py").write_text(FAILING_DISK)
        pattern = (there or ["*/config.json"])[rng.integers(max(1, len(there)))]
        path = os.pathsep.join([scratch, str(PACKAGE.parent)])
        refused(job, "Input/output error", PYTHONPATH=path, FAIL_TO_READ=pattern)
    return True


def stopped_in_time(job: Job, rng) -> bool:
    """A sweep of a hundred short runs ends within PROMPT seconds, with what it finished."""
    out = job.out.with_name("prompt")
    process = job.run(*SHORT, "--out", str(out))
    wait_for(process, (out / "config.json").exists)
    time.sleep(rng.uniform(0, 20))
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    seconds = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    if status != 128 + signal.SIGTERM or "resume with: " not in said[-1]:
        raise Lost(f"status {status}: {said[-1:]}")
    if seconds > PROMPT:
        raise Lost(f"stopped after {seconds:.1f} s")
    return True


def full_disk(job: Job, rng) -> bool:
    """A disk with room for half of the results at most, which then gets more room."""
    whole = sum(path.stat().st_size for path in job.out.with_name("alone").rglob("*"))
    with mounted(job.out, f"size={int(rng.uniform(4096, whole / 2))}"):
        status, said = ended(job.start())
        if status not in (1, 2) or len(said) != 1:
            raise Lost(f"status {status} on a full disk: {said}")
        remount(job.out, f"size={ROOM}")
        job.check()
    return True


def read_only_disk(job: Job, rng) -> bool:
    with mounted(job.out, f"size={ROOM}"):
        harmed = stop(job, rng, signal.SIGKILL)
        remount(job.out, "ro")
        status, said = ended(job.start())
        remount(job.out, "rw")
        if status != 2 or len(said) != 1:
            raise Lost(f"status {status} on a read-only disk: {said}")
        job.check()
    return harmed


@contextlib.contextmanager
def mounted(directory: Path, options: str):
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)


def can_mount() -> bool:
    with (
        contextlib.ExitStack() as held,
        contextlib.suppress(OSError, subprocess.CalledProcessError),
    ):
        scratch = held.enter_context(tempfile.TemporaryDirectory())
        held.enter_context(mounted(Path(scratch, "disk"), f"size={ROOM}"))
        return True
    return False


def two_at_once(job: Job, rng) -> bool:
    """The second command is refused, and does no harm."""
    first = job.start()
    wait_for(first, job.begun)
    status, said = ended(job.start())
    harmed = first.poll() is None  # else the second came too late
    if harmed and (status != 2 or "in use" not in said[-1]):
        raise Lost(f"status {status} beside another command: {said}")
    status, said = ended(first)
    if status:
        raise Lost(f"status {status} of the first command: {said}")
    return harmed


def one_of_three_killed(job: Job, rng) -> bool:
    """Three shards train the sweep; two of them end well, and one command trains the rest."""
    processes = [job.start("--shard", f"{i}/3") for i in range(3)]
    lost = processes.pop(rng.integers(3))
    wait_for(lost, job.begun)
    with contextlib.suppress(subprocess.TimeoutExpired):
        lost.wait(rng.uniform(0, job.seconds))
    harmed = lost.poll() is None
    lost.kill()
    lost.communicate()
    for process in processes:
        status, said = ended(process)
        if status:
            raise Lost(f"status {status} beside a killed process: {said[-1:]}")
    return harmed


@contextlib.contextmanager
def ray_cluster(nodes: int = NODES):
    """Nodes on this machine, and a head that trains nothing."""
    from ray.cluster_utils import Cluster

    # by default workers yield to all other processes
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with socket.create_server(("", 0)) as free:  # another cluster may have Ray's usual port
        port = free.getsockname()[1]
    head = NODE | {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def while_it_trains(job: Job, rng, harm: Callable[[], object]) -> bool:
    """Do `harm()` at a random moment of a command, which must end well."""
    process = job.start()
    wait_for(process, job.begun)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(0, job.seconds))
    harmed = process.poll() is None
    harm()
    ended_well(process)
    return harmed


def node_lost(job: Job, rng, graceful: bool) -> bool:
    """A node is killed, or leaves, and then another joins."""

    def replace():
        nodes = list(job.cluster.worker_nodes)
        job.cluster.remove_node(nodes[rng.integers(len(nodes))], allow_graceful=graceful)
        job.cluster.add_node(**NODE)

    return while_it_trains(job, rng, replace)


node_killed = functools.partial(node_lost, graceful=False)


def worker_killed(job: Job, rng) -> bool:
    """As the kernel, or Ray, ends a process where memory runs out."""
    import ray  # noqa: F401  its copy of psutil
    from psutil import Process

    def kill():
        raylets = [node.all_processes["raylet"][0] for node in job.cluster.worker_nodes]
        workers = [each for r in raylets for each in Process(r.process.pid).children()]
        busy = [worker for worker in workers if worker.cmdline()[0] == "ray::_task"]
        found.extend(busy)
        if busy:
            busy[rng.integers(len(busy))].kill()

    found: list = []
    return while_it_trains(job, rng, kill) and bool(found)


BALLAST = """
import numpy, ray
ray.init("auto", log_to_driver=False)
held = ray.get(ray.put(numpy.zeros(70 * 2**20, numpy.uint8)))
input(print("there", flush=True))
"""


def full_store(job: Job, rng) -> bool:
    """The object store from which the nodes are to fetch the data has no room for them."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    ballast = subprocess.Popen([sys.executable, "-c", BALLAST], text=True, **pipes)
    try:
        ballast.stdout.readline()
        harmed = ballast.poll() is None
        ended_well(job.start())
        return harmed
    finally:
        ballast.communicate("\n")


def node_with_other_code(job: Job, rng) -> bool:
    with edited_package(rng) as scratch:
        node = job.cluster.add_node(**NODE, env_vars={"PYTHONPATH": scratch})
        status, said = ended(job.start())
        job.cluster.remove_node(node, allow_graceful=False)
    if status not in (0, 2) or (status and "different training code" not in said[-1]):
        raise Lost(f"status {status}, not refused: {said[-1:]}")
    return status == 2  # else it got no task


def plain_numbers(job: Job) -> list:
    """What the same sweep gives without Ray."""
    plain = dataclasses.replace(job, front="sweep", out=job.out.with_name("plain"), cluster=None)
    ended_well(plain.start())
    return plain.results()


FAULTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "kill -9 at a random moment": (killed, tuple(COMMANDS)),
    "SIGINT or SIGTERM at a random moment": (asked_to_stop, tuple(COMMANDS)),
    "a damaged checkpoint": (
        functools.partial(damaged, pattern="checkpoints/*.npz"),
        ("train", "sweep"),
    ),
    "a damaged config.json": (
        functools.partial(damaged, pattern="config.json"),
        ("train", "sweep"),
    ),
    "a damaged Parquet file": (functools.partial(damaged, pattern="runs/*.parquet"), ("sweep",)),
    "a damaged data cache": (damaged_cache, ("train",)),
    "a full disk": (full_disk, tuple(COMMANDS)),
    "a read-only disk": (read_only_disk, ("train", "sweep")),
    "two commands at once": (two_at_once, ("train", "sweep")),
    "one process of three killed": (one_of_three_killed, ("sweep",)),
    "another project's directory": (foreign_directory, ("train", "sweep")),
    "other numerics": (other_numerics, ("train", "sweep")),
    "edited training code": (edited_code, ("train", "sweep")),
    "other labels": (other_labels, ("train", "sweep")),
    "a file that cannot be read": (unreadable_file, ("train", "sweep")),
    "a stop within 10 seconds": (stopped_in_time, ("sweep",)),
    "a Ray node killed, another joins": (node_killed, ("sweep --ray",)),
    "a Ray node leaves, another joins": (
        functools.partial(node_lost, graceful=True),
        ("sweep --ray",),
    ),
    "a Ray worker out of memory": (worker_killed, ("sweep --ray",)),
    "a full object store": (full_store, ("sweep --ray",)),
    "a Ray node with other code": (node_with_other_code, ("sweep --ray",)),
}


def count(fault: str, alone: Job, trials: int, seed: int) -> dict:
    """A row of the table, of trials that did harm; prints it, and what was lost."""
    harm, tried, lost = FAULTS[fault][0], 0, []
    for draw in range(4 * trials):  # some come too late to do harm
        if tried == trials:
            break
        job = dataclasses.replace(alone, out=alone.out.with_name("trial"))
        try:
            harmed = harm(job, np.random.default_rng([seed, draw]))
            job.check()
        except (Lost, mj.UserError, OSError) as error:
            harmed = True
            lost.append(f"draw {draw}: {error}")
        finally:
            shutil.rmtree(job.out, ignore_errors=True)
        tried += harmed
    row = {"fault": fault, "command": alone.front, "tried": tried}
    row |= {"survived": tried - len(lost), "lost": len(lost)}
    print("{fault:<38}{command:<12}{tried:>6}{survived:>10}{lost:>6}".format(**row), flush=True)
    for line in lost:
        print(f"    {line}", flush=True)
    return row


def flags(args: Args) -> list[str]:
    """Those that decide what is tried."""
    commands = shlex.join(["--commands", *args.commands])
    return [commands, f"--kills {args.kills}", f"--others {args.others}", f"--seed {args.seed}"]


def main(args: Args) -> None:
    mj.load_dataset("mnist", args.data_dir)  # prepares it if it is missing
    data_dir = args.data_dir or Path(os.getenv("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    faults = dict(FAULTS)
    if not can_mount():
        print("cannot mount disks here: full and read-only disks are left out")
        faults = {name: fault for name, fault in FAULTS.items() if "disk" not in name}
    print(f"{'fault':<38}{'command':<12}{'tried':>6}{'survived':>10}{'lost':>6}", flush=True)
    record = {"commands": [], "environment": fresh(mj.describe_environment), "faults": []}
    if args.out and args.out.exists():
        record |= json.loads(args.out.read_text()) | {"environment": record["environment"]}
    rows = record["faults"]
    done = {(row["fault"], row["command"]): row["tried"] for row in rows}
    if (command := " ".join(["python scripts/faults.py", *flags(args)])) not in record["commands"]:
        record["commands"].append(command)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        copy = Path(scratch, "data")  # its cache will be damaged
        shutil.copytree(data_dir.expanduser() / "mnist", copy / "mnist")
        for front in args.commands:
            if "--ray" in front and not find_spec("ray"):
                print("Ray is not installed: its faults are left out")
                continue
            cluster = stack.enter_context(ray_cluster()) if "--ray" in front else None
            alone = Job(front, Path(scratch, front, "alone"), copy, cluster)
            process = alone.start()
            wait_for(process, alone.begun)
            start = time.perf_counter()
            ended(process)
            alone.seconds = time.perf_counter() - start
            alone.numbers = alone.results()
            if cluster and alone.numbers != plain_numbers(alone):
                sys.exit("error: on Ray the numbers are others")
            for fault, (harm, fronts) in faults.items():
                trials = args.kills if harm in (killed, node_killed) else args.others
                trials = math.ceil(trials / len({*fronts} & {*args.commands} or {front}))
                if front in fronts and trials > done.get((fault, front), 0):
                    new = count(fault, alone, trials, args.seed)
                    new["commit"] = record["environment"]["git"]["commit"]
                    rows[:] = [r for r in rows if (r["fault"], r["command"]) != (fault, front)]
                    rows.append(new)
                    if args.out:
                        write_json(args.out, record)
    if lost := sum(row["lost"] for row in rows):
        sys.exit(f"error: {lost} trials lost something")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
