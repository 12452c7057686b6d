"""Where numbers come from, and which of them may go together.

What is said of a run or a sweep, in its config.json and beside its rows and checkpoints, carries
its SHA-256; of the code, the hardware and the numerics it names all that may change a number.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlp_jax.training.config import Config


def describe(recipe: str, config: Config, fingerprint: str, devices: Sequence) -> dict:
    """What config.json says of a run or a sweep."""
    return {
        "recipe": recipe,
        "config": dataclasses.asdict(config),
        "fingerprint": fingerprint,
        "environment": describe_environment(devices),
    }


def describe_environment(devices: Sequence) -> dict:
    """Versions, hardware (of the jax.Devices that train), numerics, and the code's commit."""
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


def sign(about: dict) -> dict:
    """`about` and its SHA-256."""
    content = json.dumps(about, sort_keys=True).encode()
    return about | {"sha256": hashlib.sha256(content).hexdigest()}


def unsign(about: dict) -> dict:
    """The inverse of `sign`; ValueError for what was changed since."""
    content = {name: value for name, value in about.items() if name != "sha256"}
    if sign(content) != about:
        raise ValueError("its SHA-256 is another")
    return content


def binding(about: dict) -> dict:
    """What all numbers of a directory share: those that differ in it are never pooled."""
    environment = about["environment"]
    shared = ("backend", "device_kind", "prng", "matmul_precision")
    return (
        {name: about[name] for name in ("recipe", "seed") if name in about}
        | about["config"]
        | {"data fingerprint": about["fingerprint"]}
        | {name: environment[name] for name in shared}
        | {"jax": environment["versions"]["jax"]}
    )


def difference(old: dict, new: dict) -> str:
    """The first entry in which two dicts differ, in words; empty where none does."""
    old, new = (json.loads(json.dumps(each)) for each in (old, new))  # tuples become lists
    for name in old | new:
        if old.get(name) != new.get(name):
            return f"{name.replace('_', ' ')} {old.get(name)}, not {new.get(name)}"
    return ""
