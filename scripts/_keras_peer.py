"""The recipe keras-sgd in Keras 3, set up as it runs fastest there; scripts/benchmark.py's peer."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import mlp_jax as mj

FOREVER = 1_000_000
"""Epochs: the benchmark ends the process when it has had enough turns."""

# An epoch has 7 x 67 steps. Median seconds per epoch of 7, on 2 cores of an Intel Xeon. One process
# with both cores: JAX 1.36 (1 step per execution: 1.40); TensorFlow 1.70 (1: 2.26, 469: 2.00;
# compiled: 1.65, and with 1: 2.48). Two processes at once, with a core each: JAX 1.95 (1: 2.09);
# TensorFlow 2.50 (1: 2.53; compiled: 2.51). Leaving out Keras' training accuracy, which mlp_jax
# does not compute, changed nothing.
SETTINGS = {"steps_per_execution": 67}


def missing(backend: str) -> str | None:
    """The first package that Keras on `backend` needs and that is not installed."""
    names = ("keras", backend)
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def train_keras(turn: Callable, seed: int, data_dir: Path | None, backend: str) -> None:
    """Train on float32 arrays in memory; `turn` gets the test accuracy after each epoch."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import keras

    config, data = mj.RECIPES["keras-sgd"], mj.load_dataset("mnist", data_dir)
    train, test = (
        (split.images.astype("float32") / 255, split.labels) for split in (data.train, data.test)
    )
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(train[0].shape[1:])])
    for width in config.hidden:
        model.add(keras.layers.Dense(width, activation="relu"))
        model.add(keras.layers.Dropout(config.dropout))
    model.add(keras.layers.Dense(config.n_classes))
    model.compile(
        optimizer=keras.optimizers.SGD(config.learning_rate),
        # on logits: faster than with a softmax layer, and the same loss
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=backend == "jax",
        **SETTINGS,
    )
    model.fit(
        *train,
        batch_size=config.batch_size,
        epochs=FOREVER,
        validation_data=test,
        validation_batch_size=len(test[1]),
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: turn([float(logs["val_accuracy"])])
            )
        ],
        verbose=0,
    )
