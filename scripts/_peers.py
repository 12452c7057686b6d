"""The net of the recipe keras-sgd in other frameworks: scripts/benchmark.py's peers.

Each trains without end, on float32 pixels in memory, and hands `turn` the accuracy on all test
images after each epoch. Initial weights are what the framework's users get: Glorot's uniform ones
in Keras, LeCun's normal ones in Flax, smaller uniform ones in PyTorch.
"""

import importlib.util
import os
import shutil
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
    """The first of these packages, or programs, that is not installed."""
    find = importlib.util.find_spec
    return next((name for name in needs if not (find(name) or shutil.which(name))), None)


def load(data_dir: Path | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels [n, 784] in [0, 1] and labels, of the training and the test images."""
    data = mj.load_dataset("mnist", data_dir)
    splits = (data.train, data.test)
    return [(split.images.astype("float32") / 255, split.labels.copy()) for split in splits]


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


def train_keras(turn: Callable, seed: int, data_dir: Path | None, backend: str) -> None:
    """Keras as its README's script writes it, but for the progress bar."""
    keras = import_keras(backend, seed)
    from keras.layers import Dense, Dropout

    (x_train, y_train), (x_test, y_test) = load(data_dir)
    y_train = keras.utils.to_categorical(y_train, 10)
    y_test = keras.utils.to_categorical(y_test, 10)

    model = keras.Sequential()
    model.add(keras.Input((784,)))
    model.add(Dense(512, activation="relu"))
    model.add(Dropout(0.2))
    model.add(Dense(512, activation="relu"))
    model.add(Dropout(0.2))
    model.add(Dense(10, activation="softmax"))
    assert model.count_params() == PARAMETERS
    model.compile(
        loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(), metrics=["accuracy"]
    )
    model.fit(
        x_train,
        y_train,
        batch_size=128,
        epochs=FOREVER,
        verbose=0,
        validation_data=(x_test, y_test),
        callbacks=[each_epoch(keras, turn)],
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


def train_torch(turn: Callable, seed: int, data_dir: Path | None, compiled: bool) -> None:
    """PyTorch as its tutorials write it, on the CPU."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    train, test = (
        TensorDataset(torch.from_numpy(images), torch.from_numpy(labels).long())
        for images, labels in load(data_dir)
    )
    train_loader = DataLoader(train, batch_size=128, shuffle=True)
    test_loader = DataLoader(test, batch_size=128)

    model = nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    if compiled:
        model = torch.compile(model)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    while True:
        model.train()
        for x, y in train_loader:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in test_loader:
                correct += (model(x).argmax(1) == y).sum().item()
        turn([correct / len(test)])


def train_flax(turn: Callable, seed: int, data_dir: Path | None) -> None:
    """Flax and Optax as their examples write it: a Python loop over jitted steps."""
    import flax.linen as nn
    import jax
    import optax
    from flax.training.train_state import TrainState

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            for _ in range(2):
                x = nn.relu(nn.Dense(512)(x))
                x = nn.Dropout(0.2, deterministic=not train)(x)
            return nn.Dense(10)(x)

    @jax.jit
    def train_step(state, x, y, key):
        def loss_fn(params):
            rngs = {"dropout": jax.random.fold_in(key, state.step)}
            logits = state.apply_fn({"params": params}, x, train=True, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    @jax.jit
    def evaluate(state, x, y):
        logits = state.apply_fn({"params": state.params}, x, train=False)
        return (logits.argmax(-1) == y).mean()

    (x_train, y_train), test = load(data_dir)
    rng = np.random.default_rng(seed)
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    model = MLP()
    params = model.init(init_key, x_train[:1], train=False)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == PARAMETERS
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.01))

    while True:
        order = rng.permutation(len(y_train))
        for start in range(0, len(order), 128):
            batch = order[start : start + 128]
            state = train_step(state, x_train[batch], y_train[batch], dropout_key)
        turn([float(evaluate(state, *test))])
