"""Where numbers come from, and which of them may be pooled.

The metadata of a run or a sweep is stored in its config.json and in the files of its rows, weights
and checkpoints. It has all that can change a number; rows that differ there are never pooled.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlp_jax
from mlp_jax.errors import UserError
from mlp_jax.training.config import RECIPES, Config, format_setting


class Metadata(NamedTuple):
    """What the runs of a directory share; `seed` is a single run's, None for a sweep.

    The fields that have defaults are missing from older records.
    """

    recipe: str
    config: Config
    fingerprint: str  # of the data set; in older records, of the training images only
    environment: dict[str, Any]
    seed: int | None = None
    images: str | None = None  # fingerprint of the training images
    program: str | None = None  # fingerprint of the training code, see `programs.trace_code`
    mixed: bool = False  # stored by --allow-mixed beside rows with other numerics

    def changed(self, rates: Collection[float] = ()) -> dict[str, Any]:
        """The settings that are not the recipe's own.

        `rates` are a sweep's learning rates: if they are several, its families are named by them.
        """
        own, settings = vars(RECIPES.get(self.recipe, Config())), dict(vars(self.config))
        del settings["n_classes"]
        if self.seed is None:
            one = next(iter(rates)) if len(rates) == 1 else own["learning_rate"]
            settings["learning_rate"] = one
        return {name: v for name, v in settings.items() if v != own[name]}

    def title(self, changed: Mapping[str, Any] | None = None) -> str:
        """The recipe and the settings that differ from it, for figures."""
        changed = self.changed() if changed is None else changed
        texts = (f"{name.replace('_', ' ')} {format_setting(v)}" for name, v in changed.items())
        return self.recipe + f" ({', '.join(texts)})" * bool(changed)

    @property
    def device_kind(self) -> str:
        return self.environment["device_kind"]

    def to_json(self) -> dict:
        fields = self._asdict() | {"config": dataclasses.asdict(self.config)}
        return {
            name: value for name, value in fields.items() if not (value is None or value is False)
        }

    @classmethod
    def from_json(cls, fields: dict, place: Path) -> "Metadata":
        """UserError, naming `place`, for fields that this version of mlp_jax cannot read."""
        try:
            config = dict(fields["config"])
            # sweeps once kept all their learning rates here; each row has its own
            if isinstance(rates := config["learning_rate"], list):
                config["learning_rate"] = rates[0]
            metadata = cls(**fields | {"config": Config.from_json(config)})
            settings(metadata), numerics(metadata)
        except UserError as error:  # of the Config
            raise UserError(f"{place}: {error}") from None
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise UserError(
                f"{place}: written by another version of mlp_jax; a newer one may read it"
            ) from error
        return metadata


def describe_environment(devices: Sequence | None = None) -> dict[str, Any]:
    """Versions, hardware, numerics, and the commit of the code; by default, of all local devices.

    UserError if flags were changed since mlp_jax was imported.
    """
    import jax

    from mlp_jax.training import parallel

    devices = devices or jax.local_devices()
    flags = _cpuinfo("flags")
    packages = ("mlp_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "n_devices": len(devices),
        # its name: equal bytes are promised on one machine only
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": flags and " ".join(each for each in INSTRUCTIONS if each in flags.split()),
        # XLA's threads: their number can change roundings
        "cores": max(parallel.n_cores(), jax.local_device_count("cpu")),
        **parallel.numerics(),
        **_flags(),
        "git": git_state(),
    }


INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile")
"""Sets for which XLA compiles other programs, with other roundings."""

VERSIONS = ("jax", "jaxlib", "flax", "optax")
"""Packages whose versions can change a number."""

# The environment of older records, which do not name these.
FORMER_NUMERICS: dict[str, Any] = {
    "x64": False,
    "threefry_partitionable": True,
    "random_seed_offset": 0,
    "disable_most_optimizations": False,
    "compiler_options": '{"init": {"xla_backend_optimization_level": 0}, "epoch, cpu":'
    ' {"xla_cpu_copy_insertion_use_region_analysis": true}}',
    "xla_flags": "",
    "library_flags": "",
    "lanes": 1,
}


def _flags() -> dict[str, str]:
    """Of XLA and its libraries, which read their variables once."""
    now, before = _read_flags(os.environ), _read_flags(mlp_jax._ENVIRON | _first_tpu_flags())
    for name, flags in now.items():
        if flags != before[name]:
            raise UserError(
                f"{name} became {flags!r} after mlp_jax was imported, perhaps too late for JAX:"
                " set the variable before Python starts"
            )
    return now


@functools.cache
def _first_tpu_flags() -> dict[str, str]:
    """As JAX left them: it adds to this variable when it is imported."""
    name = "LIBTPU_INIT_ARGS"
    return {name: os.environ[name]} if name in os.environ else {}


@functools.cache  # as JAX has read it
def _read_flag_file(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return path


def _read_flags(environ: Mapping[str, str]) -> dict[str, str]:
    """XLA's, and those of what it calls for products: oneDNN on CPU, cuBLAS, libtpu."""
    flags = environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("-"):
        flags = _read_flag_file(flags)
    names = ("ONEDNN_", "DNNL_", "NVIDIA_TF32_OVERRIDE", "LIBTPU_INIT_ARGS")
    found = (f"{name}={value}" for name, value in environ.items() if name.startswith(names))
    library = " ".join(sorted(each for each in found if "VERBOSE" not in each))
    return {"xla_flags": flags, "library_flags": library}


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a bare checkout
        return importlib.metadata.version(package)
    return None


def _cpuinfo(field: str) -> str | None:
    """What Linux says of the first processor; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return None


@functools.cache  # what is on the disk may change later, and this process keeps what it loaded
def git_state() -> dict | None:
    """Commit of this code and whether the package has changed since; None outside a checkout."""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parents[1]), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package installed into somebody else's repository is not at that repository's commit
        git("ls-files", "--error-unmatch", __file__)
        changes = git("status", "--porcelain", ".")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def settings(metadata: Metadata) -> dict[str, Any]:
    """What the runs of a directory share, with or without --allow-mixed."""
    fields = dataclasses.asdict(metadata.config)
    if metadata.seed is None:
        del fields["learning_rate"]  # it tells the runs of a sweep apart
    return {"recipe": metadata.recipe, "seed": metadata.seed} | fields


def numerics(metadata: Metadata) -> dict[str, Any]:
    """What else can change a number: versions, device, flags, code."""
    environment = FORMER_NUMERICS | metadata.environment
    names = ("backend", "device_kind", "prng", "matmul_precision", *FORMER_NUMERICS)
    if environment["backend"] != "cpu":
        # rows of any number of lanes above one agree in distribution
        names = tuple(name for name in names if name != "lanes")
    versions = environment["versions"]
    here = {name: versions[name] for name in VERSIONS}
    return here | {name: environment[name] for name in names} | {"program": metadata.program}


def differs_in_code(a: Metadata, b: Metadata) -> bool:
    """Whether the training code is known to differ.

    It is unknown in older records, and where versions or settings of JAX differ: with others, the
    same code is traced to another program.
    """
    ours, theirs = numerics(a), numerics(b)
    traced = ("prng", "matmul_precision", "x64", "threefry_partitionable", "random_seed_offset")
    comparable = all(ours[name] == theirs[name] for name in (*VERSIONS, *traced))
    return comparable and a.program != b.program and None not in (a.program, b.program)


def _difference(a: dict, b: dict) -> tuple[str, Any, Any] | None:
    """The first name under which two dicts differ, and both values."""
    return next(((name, a[name], b.get(name)) for name in a if a[name] != b.get(name)), None)


def _data(a: Metadata, b: Metadata) -> list[dict[str, str]]:
    """The fingerprints of both data, of what both name."""
    if a.images and b.images:
        return [{"data": each.fingerprint} for each in (a, b)]
    return [{"data": each.images or each.fingerprint} for each in (a, b)]


def _numerics(a: Metadata, b: Metadata) -> list[dict[str, Any]]:
    """The numerics of both that must be equal: none if one is marked as mixed."""
    if a.mixed or b.mixed:
        return [{}, {}]
    both = [numerics(each) for each in (a, b)]
    return [each | {"program": a.program and b.program and each["program"]} for each in both]


def check_settings(place: Path | str, stored: Metadata, asked: Metadata) -> None:
    """UserError, naming the first difference, if two metadata have other settings."""
    _check_asked(place, settings(stored), settings(asked))


def _check_asked(place: Path | str, stored: dict, asked: dict) -> None:
    if found := _difference(stored, asked):
        name, before, now = found
        advice = "ask for the same, or name another --out"
        raise UserError(f"{place} has {name}={before}; you asked for {name}={now}: {advice}")


def check_same(place: Path | str, stored: Metadata, asked: Metadata) -> None:
    """Raise UserError, naming the first difference, if two metadata may not be pooled.

    Different numerics are accepted if either is marked as mixed; a `program` that an older record
    lacks is ignored.
    """
    check_settings(place, stored, asked)
    _check_asked(place, *_data(stored, asked))
    if found := _difference(*_numerics(stored, asked)):
        name, before, now = found
        what = "different training code" if name == "program" else f"{name}={before}"
        here = "" if name == "program" else f", and this is {name}={now}"
        raise UserError(
            f"{place} was trained with {what}{here}, which can change the numbers: restore it, name"
            " another --out, or add --allow-mixed, which marks the rows"
        )


def check_one_sweep(path: Path, stored: Metadata, others: Metadata) -> None:
    """As `check_same`, for a file that is read beside others."""
    sides = (settings(each) for each in (stored, others)), _data(stored, others)
    for a, b in (*sides, _numerics(stored, others)):
        if found := _difference(a, b):
            name, before, now = found
            what = f"has {name}={before}, and other rows here have {name}={now}"
            if name == "program":
                what = "was trained with different training code from other rows here"
            raise UserError(f"{path} {what}: it is not of their sweep, so move it away")
