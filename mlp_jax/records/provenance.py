"""Where numbers come from, and which of them may be pooled.

The metadata of a run or a sweep is stored in its config.json and beside its rows, weights and
checkpoints. Whatever can change a number is in it; numbers that differ there are never pooled.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlp_jax.errors import UserError
from mlp_jax.training.config import Config


class Metadata(NamedTuple):
    """What the runs of a directory share; `seed` is that of a single run, None for a sweep."""

    recipe: str
    config: Config
    fingerprint: str  # of the data set
    environment: dict[str, Any]
    seed: int | None = None

    def to_json(self) -> dict:
        fields = self._asdict() | {"config": dataclasses.asdict(self.config)}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, fields: dict) -> "Metadata":
        """UserError for fields that this version of mlp_jax did not write."""
        try:
            settings = dict(fields["config"])
            # sweeps once kept all their learning rates here; each row has its own
            if isinstance(rates := settings["learning_rate"], list):
                settings["learning_rate"] = rates[0]
            metadata = cls(**fields | {"config": Config.from_json(settings)})
            _compatibility(metadata)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise UserError("written by another version of mlp_jax") from error
        return metadata


def run_metadata(
    recipe: str, config: Config, fingerprint: str, devices: Sequence, seed: int | None = None
) -> Metadata:
    """Metadata of runs that train here and now, on these jax.Devices."""
    return Metadata(recipe, config, fingerprint, describe_environment(devices), seed)


def describe_environment(devices: Sequence) -> dict[str, Any]:
    """Versions, hardware, numerics, and the commit of the code."""
    import jax

    packages = ("mlp_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "n_devices": len(devices),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "prng": jax.config.jax_default_prng_impl,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "git": _git_state(),
    }


def _processor() -> str:
    """The processor's name: equal bytes are promised on one machine only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict | None:
    """Commit of this code and whether it was changed since; None outside a git checkout."""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package installed into somebody else's repository is not at that repository's commit
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _compatibility(metadata: Metadata) -> dict[str, Any]:
    """Everything that pooled numbers must share."""
    settings, environment = dataclasses.asdict(metadata.config), metadata.environment
    if metadata.seed is None:
        del settings["learning_rate"]  # it tells the runs of a sweep apart
    numerics = ("backend", "device_kind", "prng", "matmul_precision")
    return (
        {"recipe": metadata.recipe, "seed": metadata.seed}
        | settings
        | {"data": metadata.fingerprint}
        | {name: environment[name] for name in numerics}
        | {"jax": environment["versions"]["jax"]}
    )


def check_same(place: Path, stored: Metadata, asked: Metadata) -> None:
    """UserError that names the first difference between two metadata, if they may not be pooled."""
    there, here = _compatibility(stored), _compatibility(asked)
    for name, value in there.items():
        if value != here[name]:
            raise UserError(
                f"{place} has {name}={value}; you asked for {name}={here[name]}:"
                " change that, or name another --out"
            )
