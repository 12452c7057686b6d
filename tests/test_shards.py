"""Several processes share the runs of one sweep, and none needs another."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlp_jax.cli import parse_shard
from mlp_jax.errors import UserError
from mlp_jax.experiment import open_experiment
from mlp_jax.records import rows as store
from mlp_jax.training.config import Config
from mlp_jax.training.run import make_run

COMMAND = [
    *(sys.executable, "-m", "mlp_jax.sweep", "--quiet", "--dataset", "kmnist"),
    *("--hidden", "16", "8", "--batch-size", "32", "--learning-rate", "0.1"),
    # long enough to be killed in the middle, by the clock of any machine
    *("--epochs", "40", "--checkpoint-every", "10", "--chunk", "2", "--seeds", "0:36"),
]


def rows(directory):
    return store.read_runs(Path(directory)).drop_columns("seconds").to_pylist()


def test_a_lost_shard_loses_its_unfinished_chunk_and_any_number_resumes(small_dir, tmp_path):
    command = [*COMMAND, "--data-dir", str(small_dir), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    out = tmp_path / "shared"

    def start(shards):
        flags = [[*command, str(out), "--shard", f"{i}/{shards}"] for i in range(shards)]
        return [subprocess.Popen(each, stderr=subprocess.PIPE, text=True) for each in flags]

    processes = start(3)
    while not (found := store.row_files(out)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    # the seeds are interleaved: kill a shard other than the one that finished a chunk first
    lost = processes.pop((int(found[0].name.split("-seed")[1].split("-")[0]) + 1) % 3)
    lost.kill()
    lost.communicate()
    for process in processes:
        printed = process.communicate(timeout=300)[1]
        assert process.returncode == 0, printed
    assert 24 <= len(rows(out)) < 36
    for process in start(2):
        printed = process.communicate(timeout=300)[1]
        assert process.returncode == 0, printed
    assert rows(out) == rows(tmp_path / "whole")
    # no finished run was trained again
    assert sum(map(store.count_rows, store.row_files(out))) == 36


def test_a_shard_leaves_the_directory_in_which_another_is_about_to_write(small, here):
    config = Config(hidden=(16, 8), batch_size=32, epochs=1, learning_rate=0.1)
    runs = [make_run(0, 0.1)]
    with open_experiment(Path("s"), config, small, runs, recipe="custom", shard=(0, 2)) as opened:
        Path("s/checkpoints").mkdir()
        list(opened.train(runs))
    assert len(rows("s")) == 1
    assert Path("s/checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "environ", "shard"),
    [
        (None, {}, (0, 1)),
        ("2/3", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "9"}, (2, 3)),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
            },
            (2, 4),
        ),
        (
            None,  # --array=0-14:2
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_COUNT": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (7, 8),
        ),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": ""}, (0, 1)),
        (None, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        # the processes of the tasks of an array
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            (7, 8),
        ),
        # a batch script outside srun is one process, however many tasks it may start
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),
        (None, {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        (  # mpirun in an allocation of two nodes, on which srun started its daemons
            None,
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}
            | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            (3, 8),
        ),
    ],
)
def test_a_shard_is_that_of_the_job(text, environ, shard):
    assert parse_shard(text, environ) == shard


def test_kubernetes_does_not_say_how_many(tmp_path):
    with pytest.raises(UserError, match=r"--shard \$JOB_COMPLETION_INDEX/N"):
        parse_shard(None, {"JOB_COMPLETION_INDEX": "1"})
    assert parse_shard("1/2", {"JOB_COMPLETION_INDEX": "1"}) == (1, 2)


def test_more_shards_than_runs(small_dir, tmp_path):
    command = [*COMMAND, "--data-dir", str(small_dir), "--out", str(tmp_path / "s")]
    subprocess.run([*command, "--seeds", "0:1", "--shard", "1/2"], check=True)
    assert not Path(tmp_path / "s").exists()
