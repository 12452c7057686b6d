"""The compiled programs of a Config, and the fingerprint of their code.

A program is compiled once per Config and placement, whatever the runs, their number, their rates
and the epochs.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from mlp_jax.errors import UserError
from mlp_jax.training.arrays import N_PIXELS, count_steps
from mlp_jax.training.config import Config
from mlp_jax.training.parallel import COMPILER_OPTIONS, Placement, RunBytes, map_runs, numerics
from mlp_jax.training.run import STREAMS
from mlp_jax.training.step import (
    EVAL_BATCH,
    TrainState,
    eval_params,
    evaluate,
    init_state,
    run_keys,
    train_epoch,
)

_SHARED = {
    "learning_rate": (1e-9, 1e9),
    "epochs": (1e-9, 10**9),
    "dataset": ("", "other"),
    "split": ("test", "validation"),
    "teacher": ("", "other"),
}
FIXED_VALUES: dict[str, Any] = {name: first for name, (first, _) in _SHARED.items()}
OTHER_VALUES = {name: second for name, (_, second) in _SHARED.items()}
"""Two values of each setting that programs share: code that reads one, or compares it with a
threshold, makes a difference between them."""

READS = "one compiled program serves all values of {}: do not read them".format(
    ", ".join(f"config.{name}" for name in _SHARED)
)
CHANGES = (
    "the training code is another each time that JAX traces it: draw random numbers from the run's"
    " keys, and read no clock"
)

CALLS_BACK = "compute in JAX what Python computes there, which the code's fingerprint cannot tell"

EPOCHS = (1e-9, 0.3, 0.5, 0.7, 2)
STEPS = [1, 141, 234, 328, 938, 1, 70, 118, 164, 470]
"""Of EPOCHS of 60,000 images and of 30,000, when the first fingerprints were stored."""


class Programs(NamedTuple):
    """Compiled for one group of runs, with the signature of `parallel.map_runs`."""

    init: Callable
    epoch: Callable
    fingerprint: str  # of the code that was compiled, see `trace_code`


def current_programs(config: Config, placement: Placement, data: tuple) -> Programs:
    """Compiled ahead of time for `Dataset.arrays`, of which only shapes and types matter.

    Configs that differ only in FIXED_VALUES share them, as long as nobody edits this code, say in a
    notebook. UserError for code that reads a setting that they are not given.
    """
    if jax.config.values["jax_disable_jit"]:
        raise UserError("mlp_jax trains compiled programs only: unset JAX_DISABLE_JIT")
    code = trace_code(config, data)
    leaves, tree = jax.tree.flatten(_shapes(data, placement.replicated))
    shared = replace(config, **FIXED_VALUES)
    return _compile(code, shared, placement, tuple(leaves), tree, tuple(numerics().values()))


def _init(config: Config, _, run, shared):
    """With the signature that `parallel.map_runs` expects, like `_epoch`."""
    seeds, _ = run
    return init_state(run_keys(seeds), config=config), ()


def _epoch(config: Config, state: TrainState, run, shared):
    (seeds, learning_rate), (train, test, teacher, epoch, n_steps) = run, shared
    args = (train, run_keys(seeds), learning_rate, epoch, n_steps)
    state, trained = train_epoch(state, *args, config=config, teacher=teacher)
    tested, predictions = evaluate(eval_params(state), test, config=config)
    metrics = {f"train_{name}": value for name, value in trained.items()}
    metrics |= {f"test_{name}": value for name, value in tested.items()}
    return state, (metrics, predictions)


@dataclass(frozen=True)
class Code:
    """One run as JAX traced it, independent of the devices."""

    fingerprint: str  # SHA-256, in hex
    init: Any = field(compare=False)  # jax.stages.Traced
    epoch: Any = field(compare=False)


def trace_code(config: Config, data: tuple) -> Code:
    """Trace one run of `config` on `Dataset.arrays`, or on their shapes.

    The fingerprint is that of the jaxprs with their constants. It changes with anything in this
    code that can change a number, but not with comments, names or files, nor with rate, epochs or
    seeds. How JAX compiles it depends on JAX's recorded version. The program is given its number of
    steps, so if these are counted differently that is added.
    """
    array = jax.ShapeDtypeStruct
    run = (array((len(STREAMS),), np.uint32), array((), np.float32))
    shared = (*_shapes(data), array((), np.int32), array((), np.int32))
    init = jax.jit(functools.partial(_init, config)).trace((), run, ())
    epoch = jax.jit(functools.partial(_epoch, config)).trace(init.out_info[0], run, shared)
    constants = [each for part in (init, epoch) for each in _constants(part.jaxpr)]
    # str(jaxpr) is coloured on a terminal and in a notebook
    texts = [part.jaxpr.pretty_print(use_color=False) for part in (init, epoch)]
    runs = [replace(Config(), epochs=epochs) for epochs in EPOCHS]
    steps = [count_steps(each, n) for n in (60_000, 30_000) for each in runs]
    text = "\n".join([*texts, f"{constants}", *([f"{steps}"] if steps != STEPS else [])])
    return Code(hashlib.sha256(text.encode()).hexdigest(), init, epoch)


@functools.lru_cache(maxsize=8)
def _compile(
    code: Code, config: Config, placement: Placement, leaves: tuple, tree: Any, settings: tuple
) -> Programs:
    """`leaves` and `tree` are the shapes of the data, flattened so that they can be hashed.

    `settings` are JAX's own, which it reads when it traces and compiles.
    """
    array: Any = functools.partial(jax.ShapeDtypeStruct, sharding=placement.run_sharding)
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=placement.replicated)
    width, data = placement.width, jax.tree.unflatten(tree, leaves)
    shared = (*data, scalar, scalar)
    runs = (array((width, len(STREAMS)), np.uint32), array((width,), np.float32))
    init_fn, epoch_fn = (
        jax.jit(map_runs(_as_function(part), placement), donate_argnums=0)
        for part in (code.init, code.epoch)
    )
    init = init_fn.lower((), runs, ())
    epoch = epoch_fn.lower(init.out_info[0], runs, shared)
    for name, each in epoch.out_info[1][0].items():
        if each.shape != (width,):
            raise UserError(f"the metric {name} must be one number per run: history and rows are")
    options = COMPILER_OPTIONS.get(f"epoch, {placement.devices[0].platform}", {})
    with ThreadPoolExecutor(max_workers=2) as beside:
        quick = beside.submit(init.compile, COMPILER_OPTIONS["init"])
        slow = beside.submit(epoch.compile, options)
        _check_shared(code, config, data)  # while XLA compiles
        return Programs(quick.result(), slow.result(), code.fingerprint)


def _as_function(traced: Any) -> Callable:
    """The function that was traced, which is not called again."""
    flat, tree = jaxpr_as_fun(traced.jaxpr), jax.tree.structure(traced.out_info)
    return lambda *args: jax.tree.unflatten(tree, flat(*jax.tree.leaves(args)))


def _check_shared(code: Code, config: Config, data: tuple) -> None:
    """UserError unless other values of what programs share give the same code."""
    for values in (FIXED_VALUES, OTHER_VALUES):
        if (other := fingerprint_code(config, data, values)) != code.fingerprint:
            again = fingerprint_code(config, data, values)
            raise UserError(READS if again == other else CHANGES)


def _constants(part: Any) -> Iterator[bytes]:
    """Those of a jaxpr and of all within it, such as functions that are jitted themselves.

    UserError for a call of Python, whose code is no part of it.
    """
    if isinstance(part, ClosedJaxpr):
        yield from map(_to_bytes, part.consts)
        yield from _constants(part.jaxpr)
    elif isinstance(part, Jaxpr):
        for equation in part.eqns:
            if equation.primitive.name in ("pure_callback", "io_callback"):
                raise UserError(f"the training code has a {equation.primitive.name}: {CALLS_BACK}")
            for each in (*equation.invars, *equation.params.values()):
                yield from _constants(each)
    elif isinstance(part, Literal) and np.ndim(part.val):
        yield _to_bytes(part.val)
    elif isinstance(part, tuple | list):
        for each in part:
            yield from _constants(each)


def _to_bytes(constant: Any) -> bytes:
    if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant).tobytes()


def fingerprint_code(config: Config, data: tuple, values: dict[str, Any] = FIXED_VALUES) -> str:
    """See `trace_code`; `values` are of the settings that programs share."""
    return trace_code(replace(config, **values), data).fingerprint


def _shapes(tree: Any, sharding=None) -> Any:
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), tree)


def state_shapes(config: Config) -> TrainState:
    """Shapes and dtypes of a run's state."""
    seeds = jax.ShapeDtypeStruct((len(STREAMS),), np.uint32)
    return jax.eval_shape(lambda seeds: init_state(run_keys(seeds), config=config), seeds)


def run_bytes(config: Config) -> RunBytes:
    n_state = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(config)))
    # donated state, gradients and updates; hidden activations of the test batch and their ReLU
    n_activations = 2 * EVAL_BATCH * (N_PIXELS + sum(config.hidden))
    return RunBytes(4 * n_state, 4 * (3 * n_state + n_activations))
