"""A sweep on three Ray nodes of this machine, which die, join and differ."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mlp_jax.errors import UserError
from mlp_jax.files import load_arrays
from mlp_jax.records import rows as store
from mlp_jax.sweep import main as sweep_main

# Ray leaves its files to the garbage collector, and nodes that it has killed
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

COMMAND = [
    *(sys.executable, "-m", "mlp_jax.sweep", "--dataset", "kmnist", "--keep-weights"),
    *("--hidden", "16", "8", "--batch-size", "32", "--learning-rate", "0.1"),
    # long enough to be killed in the middle, by the clock of any machine
    *("--epochs", "40", "--chunk", "2", "--seeds", "0:36"),
]


def free_port():
    """Not Ray's usual one, at which another cluster of this machine may listen."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """A head that trains nothing; tests add the nodes."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # by default workers yield to all other processes, as these of a busy machine may be
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def plain(small_dir, tmp_path_factory):
    """The rows and the weights of a sweep without Ray."""
    out = tmp_path_factory.mktemp("plain") / "out"
    flags = ["--quiet", "--data-dir", str(small_dir), "--out", str(out)]
    subprocess.run([*COMMAND, *flags], check=True)
    return results(out)


def results(directory):
    """All that is stored but for the clock and the machine."""
    rows = store.read_runs(directory).drop_columns("seconds").to_pylist()
    paths = sorted(directory.glob("weights/*.npz"))
    weights = [{k: v.tobytes() for k, v in load_arrays(path)[0].items()} for path in paths]
    return rows, dict(zip([path.name for path in paths], weights, strict=True))


def start(cluster, small_dir, out, command=COMMAND):
    flags = ["--data-dir", str(small_dir), "--out", str(out), "--ray", cluster.address]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Ray puts its directory on the path of all workers: not where a checkout's metadata lie
    return subprocess.Popen([*command, *flags], **pipes, cwd=small_dir)


def wait_for_rows(process, out, n_files):
    while len(list(out.glob("runs/*.parquet"))) < n_files:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def end(process, status=0):
    printed = process.communicate(timeout=300)[1]
    assert process.returncode == status, printed
    return printed.strip().splitlines()


def test_a_node_of_another_version_is_refused(cluster, small_dir, tmp_path):
    about = tmp_path / "mlp_jax-9.9.9.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: mlp_jax\nVersion: 9.9.9\n")
    path = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    (line,) = end(start(cluster, small_dir, tmp_path / "out"), status=2)
    cluster.remove_node(node)
    assert "error: node 1" in line
    assert "mlp_jax is 9.9.9, but 0." in line
    assert not (tmp_path / "out").exists()


# a sweep whose tasks leave a line; a function of __main__ is sent to the nodes by value
LOGGED = """
import os, pickle, sys
import mlp_jax.cluster
from mlp_jax.sweep import main

def logged(there, job, chunk):
    from mlp_jax.cluster import _task  # on a node it is not replaced
    from mlp_jax.cluster import _machine
    runs, *_ = pickle.loads(chunk)
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.environ['NODE']} {[run.seed for run in runs]}\\n")
    done = _task(there, job, chunk)
    assert _machine.cache_info().misses == 1, "compiled, or loaded the data, again"
    return done

mlp_jax.cluster._task = logged
main(sys.argv[2:])
"""


def test_a_death_costs_what_was_not_stored(cluster, small_dir, tmp_path, plain):
    out, begun = tmp_path / "out", tmp_path / "begun"
    begun.touch()
    log = LOGGED.replace("sys.argv[1]", repr(str(begun)))
    node = cluster.add_node(num_cpus=1, env_vars={"NODE": "A"})
    command = [sys.executable, "-c", log, "-", *COMMAND[3:]]
    process = start(cluster, small_dir, out, command)
    wait_for_rows(process, out, 4)
    cluster.remove_node(node, allow_graceful=False)
    stored = {run["seed"] for run in store.read_runs(out).to_pylist()}
    node = cluster.add_node(num_cpus=1, env_vars={"NODE": "B"})
    end(process)
    cluster.remove_node(node)
    assert results(out) == plain
    lines = [line.split(" ", 1) for line in begun.read_text().splitlines()]
    chunks = Counter(seeds for _, seeds in lines if seeds != "[]")  # that of `prepare` is empty
    assert len(chunks) == 18
    assert {node for node, _ in lines} == {"A", "B"}
    # again: the chunk that the node was training, and those that were on their way to be stored
    again = {seeds for seeds, times in chunks.items() if times > 1}
    assert sum(chunks.values()) == 18 + len(again)
    assert again <= {seeds for node, seeds in lines if node == "A"}
    assert not again & {str([seed, seed + 1]) for seed in stored}
    assert len(again) <= 3


@pytest.mark.parametrize(
    ("node", "share"),
    [({"num_gpus": 2}, ("GPU", 1)), ({"resources": {"TPU": 4}}, ("TPU", 4))],
    ids=["a GPU of two", "a TPU host"],
)
def test_a_task_takes_an_accelerator(node, share, cluster, small_dir, tmp_path, plain):
    """Said to be there, on a node that has none: the numbers are those of its CPU."""
    out, taken = tmp_path / "out", tmp_path / "taken"
    log = """
import sys
import mlp_jax.cluster
from mlp_jax.sweep import main

def logged(*args):
    import ray
    from mlp_jax.cluster import _task
    with open(TAKEN, "a") as file:
        file.write(f"{ray.get_runtime_context().get_assigned_resources()[KIND]:g}\\n")
    return _task(*args)

mlp_jax.cluster._task = logged
main(sys.argv[2:])
""".replace("TAKEN", repr(str(taken))).replace("KIND", repr(share[0]))
    added = cluster.add_node(num_cpus=1, **node)
    end(start(cluster, small_dir, out, [sys.executable, "-c", log, "-", *COMMAND[3:]]))
    cluster.remove_node(added)
    assert results(out) == plain
    assert set(taken.read_text().split()) == {str(share[1])}


def test_nodes_die_and_join_and_the_command_is_stopped(cluster, small_dir, tmp_path, plain):
    out = tmp_path / "out"
    node = cluster.add_node(num_cpus=1)
    process = start(cluster, small_dir, out)
    wait_for_rows(process, out, 1)
    process.send_signal(signal.SIGTERM)
    lines = end(process, status=128 + signal.SIGTERM)
    stored = len(store.read_runs(out))
    line = f"SIGTERM: {stored} of 36 runs finished; resume with: "
    assert any(line in each for each in lines)  # Ray may have more to say
    assert 2 <= stored < 30

    for _ in range(2):
        cluster.add_node(num_cpus=1, wait=False)
    cluster.wait_for_nodes()
    process = start(cluster, small_dir, out)
    wait_for_rows(process, out, stored // 2 + 1)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert len(store.read_runs(out)) < 36
    *_, line = end(process)
    assert "36 of 36 runs, " in line
    # the killed one may still count as alive
    assert re.search(r" on [34] nodes \[", line)
    rows, weights = results(out)
    assert rows == plain[0]
    assert weights == plain[1]
    # no finished run was trained again
    assert sum(map(store.count_rows, store.row_files(out))) == 36


def test_a_signal_while_ray_shuts_down_ends_nothing(small_dir, tmp_path, monkeypatch):
    pytest.importorskip("ray")

    @contextlib.contextmanager
    def connect(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init puts its own there
        yield None  # and this machine trains
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mlp_jax.cluster.connect", connect)
    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "out"
    flags = ["--data-dir", str(small_dir), "--out", str(out), "--ray", "--epochs", "1"]
    sweep_main([*COMMAND[3:], *flags])
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(store.read_runs(out)) == 36


def test_without_ray_one_line_says_what_to_install(small_dir, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "mlp_jax.cluster", raising=False)
    with pytest.raises(UserError, match=r"pip install 'mlp_jax\[ray\]'"):
        sweep_main(["--data-dir", str(small_dir), "--out", "s", "--ray"])
    assert not Path("s").exists()
