"""The net of the recipe keras-sgd in Keras 3: scripts/benchmark.py's peers.

Each trains without end, on float32 pixels in memory, and hands `turn` the accuracy on all test
images after each epoch.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import mlp_jax as mj

FOREVER = 1_000_000
"""Epochs: the benchmark ends the process when it has had enough turns."""
PARAMETERS = 669_706

# An epoch has 7 x 67 steps. Median seconds per epoch of 7, on 2 cores of an Intel Xeon. One process
# with both cores: JAX 1.36 (1 step per execution: 1.40); TensorFlow 1.70 (1: 2.26, 469: 2.00;
# compiled: 1.65, and with 1: 2.48). Two processes at once, with a core each: JAX 1.95 (1: 2.09);
# TensorFlow 2.50 (1: 2.53; compiled: 2.51). Leaving out Keras' training accuracy, which mlp_jax
# does not compute, changed nothing.
STEPS_AT_BEST = 67


def missing(needs: Iterable[str]) -> str | None:
    """The first of these packages that is not installed."""
    return next((name for name in needs if not importlib.util.find_spec(name)), None)


def load(data_dir: Path | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels [n, 784] in [0, 1] and labels, of the training and the test images."""
    data = mj.load_dataset("mnist", data_dir)
    splits = (data.train, data.test)
    return [(split.images.astype("float32") / 255, split.labels) for split in splits]


def import_keras(backend: str, seed: int):
    os.environ["KERAS_BACKEND"] = backend
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import keras

    keras.utils.set_random_seed(seed)
    return keras


def each_epoch(keras, turn: Callable):
    return keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: turn([float(logs["val_accuracy"])])
    )


def train_keras_at_best(
    turn: Callable,
    seed: int,
    data_dir: Path | None,
    backend: str,
    steps_per_execution: int = STEPS_AT_BEST,
) -> None:
    """Keras set up as it runs fastest."""
    keras = import_keras(backend, seed)
    config, (train, test) = mj.RECIPES["keras-sgd"], load(data_dir)
    model = keras.Sequential([keras.Input(train[0].shape[1:])])
    for width in config.hidden:
        model.add(keras.layers.Dense(width, activation="relu"))
        model.add(keras.layers.Dropout(config.dropout))
    model.add(keras.layers.Dense(config.n_classes))
    assert model.count_params() == PARAMETERS
    model.compile(
        optimizer=keras.optimizers.SGD(config.learning_rate),
        # on logits: faster than with a softmax layer, and the same loss
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=backend == "jax",
        steps_per_execution=steps_per_execution,
    )
    model.fit(
        *train,
        batch_size=config.batch_size,
        epochs=FOREVER,
        validation_data=test,
        validation_batch_size=len(test[1]),
        callbacks=[each_epoch(keras, turn)],
        verbose=0,
    )
