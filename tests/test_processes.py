"""Real processes that meet over loopback: they share the seeds, and none needs another."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlp_jax.records import rows as store

EPOCHS = 40  # long enough to be killed in the middle, by the clock of any machine
COMMAND = [
    *(sys.executable, "-m", "mlp_jax.sweep", "--quiet", "--dataset", "kmnist"),
    *("--hidden", "16", "8", "--batch-size", "32", "--learning-rate", "0.1"),
    *("--epochs", str(EPOCHS), "--checkpoint-every", "10", "--chunk", "2", "--seeds", "0:36"),
]


def start(small_dir, out, processes):
    """A sweep of so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [*COMMAND, "--data-dir", str(small_dir), "--out", str(out)]
    shared = ["--coordinator", address, "--num-processes", str(processes), "--process-id"]
    return [
        subprocess.Popen([*command, *shared, str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]


def rows(directory):
    return store.read_runs(directory).drop_columns("seconds").to_pylist()


def test_a_lost_process_loses_its_unfinished_chunk_and_any_number_goes_on(small_dir, tmp_path):
    command = [*COMMAND, "--data-dir", str(small_dir)]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True)
    out = tmp_path / "shared"
    processes = start(small_dir, out, 3)
    # which of them finished a chunk first is told by its seeds, dealt by turns
    while not (found := store.chunk_paths(out)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    lost = processes.pop((int(found[0].name.split("-seed")[1].split("-")[0]) + 1) % 3)
    lost.kill()
    lost.communicate()
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    left = rows(out)
    assert 24 <= len(left) < 36
    for process in start(small_dir, out, 2):
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    assert rows(out) == rows(tmp_path / "whole")
    # nothing that was whole was trained again
    assert sum(len(row) for row in map(read, store.chunk_paths(out))) == 36


def read(path):
    with store.open_chunk(path) as file:
        return file.read(["seed"]).to_pylist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator localhost:1", "the processes did not meet: Number of processes must"),
        ("--distributed", "the processes did not meet: coordinator_address should be defined"),
        (
            "--coordinator localhost:1 --num-processes 2 --process-id 2",
            "the processes did not meet: process_id and num_processes must be nonnegative",
        ),
    ],
)
def test_what_cannot_meet_says_so_in_one_line(flags, message, small_dir, tmp_path):
    command = [*COMMAND, "--data-dir", str(small_dir), "--out", str(tmp_path / "s")]
    done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())
