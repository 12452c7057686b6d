"""Small-network research in JAX: one MLP on MNIST, or hundreds of seeds of it at once.

    import mlp_jax as mj

    data = mj.load_dataset("mnist")
    table = mj.sweep(mj.RECIPES["short"], data, "runs/short", seeds=range(100))
    for epoch in mj.fit(mj.RECIPES["short"], data, seeds=range(8)):
        print(epoch.test_accuracy)
    runs = mj.read_runs("results/keras-sgd").to_pandas()
    logits = mj.predict(mj.load_run("runs/mine"), data.test.images)

The same from a shell: `python -m mlp_jax.train`, `mlp_jax.sweep` and `mlp_jax.report`.
Names are imported on first use, so importing the package costs nothing.
"""

import importlib
import os
import sys
import types
from typing import Any

_HOMES = {
    "Config": "training.config",
    "RECIPES": "training.config",
    "UserError": "errors",
    "compare": "compare",
    "describe_environment": "records.provenance",
    "fit": "training.fit",
    "load_data": "experiment",
    "load_dataset": "data.dataset",
    "load_run": "records.checkpoint",
    "predict": "records.checkpoint",
    "read_runs": "records.rows",
    "report": "report",
    "sweep": "sweep",
    "use_cores": "training.parallel",
}
__all__ = list(_HOMES)
_ENVIRON = dict(os.environ)  # what changes later, JAX may not have read


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing the command mlp_jax.sweep would hide the function of that name; its main is
        # reached by `from mlp_jax.sweep import main`
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
