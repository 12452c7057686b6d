"""Config -> Optax: the one place to add an update rule.

The learning rate is an array in the optimizer's state, never a constant of the program, so runs
at different learning rates share one compilation.
"""

import optax

from mlp_jax.training.config import Config

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    # Keras' RMSprop: rho 0.9, and epsilon 1e-7 under the root (keras/src/optimizers/rmsprop.py).
    "rmsprop": lambda learning_rate: optax.rmsprop(
        learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=True
    ),
    # Keras' Adam, whose epsilon is 1e-7 too.
    "adam": lambda learning_rate: optax.adam(learning_rate, eps=1e-7),
}


def make_optimizer(config: Config, learning_rate=None) -> optax.GradientTransformation:
    """The update rule of `config`; `init` puts `learning_rate` (traced or not) into its state.

    `update` reads the rate from the state alone.
    """
    return optax.inject_hyperparams(OPTIMIZERS[config.optimizer])(
        learning_rate=config.learning_rate if learning_rate is None else learning_rate
    )
