"""Update rules and schedules: the one place to add either.

The rules are Optax transformations without a learning rate: the step multiplies their output by
minus the rate and the schedule's factor, both arrays, so runs of any rate and length share one
compiled program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mlp_jax.training.config import Config

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(decay=0.9),
    "nesterov": lambda: optax.trace(decay=0.9, nesterov=True),
    # Keras' RMSprop: rho 0.9, and epsilon 1e-7 under the root (keras/src/optimizers/rmsprop.py).
    "rmsprop": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=True),
    # as in Keras before version 3: epsilon outside the root
    "rmsprop-outside": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=False),
    # Keras' Adam, whose epsilon is 1e-7 too.
    "adam": lambda: optax.scale_by_adam(eps=1e-7),
    # Dozat 2016, with decays short enough for a few hundred steps
    "nadam": lambda: optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-7, nesterov=True),
    # with Optax's settings
    "adabelief": optax.scale_by_belief,
    "adadelta": optax.scale_by_adadelta,
    "adagrad": optax.scale_by_rss,
    "adamax": optax.scale_by_adamax,
    "adan": optax.scale_by_adan,
    "amsgrad": optax.scale_by_amsgrad,
    "lion": optax.scale_by_lion,
    "muon": lambda: optax.contrib.muon(-1.0),  # -1 undoes its sign; Adam for the biases
    "novograd": optax.scale_by_novograd,
    "radam": optax.scale_by_radam,
    "sign-sgd": optax.scale_by_sign,
    "sm3": optax.scale_by_sm3,
    "yogi": optax.scale_by_yogi,
}

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array | float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    # Loshchilov and Hutter, arXiv 1608.03983, without restarts
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The rule of a Config, then decoupled weight decay (arXiv 1711.05101)."""
    rule = OPTIMIZERS[config.optimizer]()
    if not config.weight_decay:
        return rule
    return optax.chain(rule, optax.add_decayed_weights(config.weight_decay, mask=_is_kernel))


def _is_kernel(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def clip_norms(params: dict, config: Config) -> dict:
    """`params` with the weights into each hidden unit scaled to a norm of at most `max_norm`."""

    def clip(layer: str, leaves: dict) -> dict:
        if layer == "output":
            return leaves
        norms = jnp.linalg.norm(leaves["kernel"], axis=0)
        factors = jnp.minimum(1, config.max_norm / jnp.maximum(norms, 1e-12))  # no 0 / 0
        return leaves | {"kernel": leaves["kernel"] * factors[None, :]}

    return {layer: clip(layer, leaves) for layer, leaves in params.items()}


def cycle_progress(step: jax.Array, n_steps: jax.Array, *, config: Config) -> jax.Array:
    """The fraction of steps taken of the training, or of its present cycle, in [0, 1)."""
    done = step
    if config.cycles > 1:
        # step * cycles % n_steps, in integers: rounded, a cycle's first step may seem the last of
        # the one before; by doubling, as the product may overflow
        done = jnp.zeros_like(step)
        for bit in f"{config.cycles:b}":
            done = (2 * done + int(bit) * step) % n_steps
    return done / n_steps


def schedule(progress: jax.Array, *, config: Config) -> jax.Array | float:
    """The factor of the learning rate at a `cycle_progress`."""
    if not config.warmup:
        return SCHEDULES[config.schedule](progress)
    rest = (progress - config.warmup) / (1 - config.warmup)
    falling = SCHEDULES[config.schedule](jnp.maximum(rest, 0))
    return jnp.where(rest < 0, progress / config.warmup, falling)
