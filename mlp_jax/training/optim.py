"""Update rules and schedules: the one place to add either.

The rules are rate-free Optax transformations: the step multiplies what they return by minus the
learning rate and the schedule's factor, both arrays, so runs at any rate and of any length share
one compiled program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mlp_jax.training.config import Config

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(decay=0.9),
    # Keras' RMSprop: rho 0.9, and epsilon 1e-7 under the root (keras/src/optimizers/rmsprop.py).
    "rmsprop": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=True),
    # Keras' Adam, whose epsilon is 1e-7 too.
    "adam": lambda: optax.scale_by_adam(eps=1e-7),
}

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array | float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    # Loshchilov and Hutter, arXiv 1608.03983, without restarts
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return OPTIMIZERS[config.optimizer]()


def schedule(progress: jax.Array, *, config: Config) -> jax.Array | float:
    """The factor of the learning rate at `progress`, the fraction of all steps taken, in [0, 1)."""
    return SCHEDULES[config.schedule](progress)
