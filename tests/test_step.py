"""One run: the update rules against NumPy, the scan against the loop, the last batch, the keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_jax.training import fit as fit_module
from mlp_jax.training import optim, step
from mlp_jax.training.arrays import count_steps
from mlp_jax.training.losses import Batch
from mlp_jax.training.model import to_float
from mlp_jax.training.run import STREAMS, make_run

init_state, train_step, train_epoch, evaluate = (
    jax.jit(function, static_argnames="config")
    for function in (step.init_state, step.train_step, step.train_epoch, step.evaluate)
)


def start(config, seed=0):
    keys = step.run_keys(jnp.array(make_run(seed, 1.0).seeds, jnp.uint32))
    return keys, init_state(keys, config=config)


def one_step(state, batch, keys, config, n_steps=20):
    return train_step(state, batch, keys, config.learning_rate, n_steps, config=config)


def one_epoch(state, split, keys, epoch, config, n_steps=10_000):
    rate = config.learning_rate
    return train_epoch(state, split, keys, rate, epoch, n_steps, config=config)


def whole_batch(split, rows):
    rows = np.asarray(rows)
    return Batch(to_float(split.images[rows]), split.labels[rows], jnp.ones(len(rows)))


def leaves64(params):
    return {
        layer: {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
        for layer, leaves in params.items()
    }


def numpy_gradients(params, images, labels):
    """Back-propagation of the mean cross-entropy through two ReLU layers, in float64."""
    x = images.astype(np.float64)
    a0 = x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    h0 = np.maximum(a0, 0)
    a1 = h0 @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"]
    h1 = np.maximum(a1, 0)
    logits = h1 @ params["output"]["kernel"] + params["output"]["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(labels)), labels]).mean()
    d2 = p.copy()
    d2[np.arange(len(labels)), labels] -= 1
    d2 /= len(labels)
    d1 = (d2 @ params["output"]["kernel"].T) * (a1 > 0)
    d0 = (d1 @ params["hidden_1"]["kernel"].T) * (a0 > 0)
    return loss, {
        "hidden_0": {"kernel": x.T @ d0, "bias": d0.sum(0)},
        "hidden_1": {"kernel": h0.T @ d1, "bias": d1.sum(0)},
        "output": {"kernel": h1.T @ d2, "bias": d2.sum(0)},
    }


def sgd(rate, p, g, memory):
    return p - rate * g, memory


def rmsprop(rate, p, g, memory):
    # keras/src/optimizers/rmsprop.py: epsilon is added to the mean square, under the root
    memory = 0.9 * memory + 0.1 * g**2
    return p - rate * g / np.sqrt(memory + 1e-7), memory


def momentum(rate, p, g, memory):
    memory = 0.9 * memory + g
    return p - rate * memory, memory


def adam(rate, p, g, memory):
    # arXiv 1412.6980, with Keras' epsilon; memory is (t, m, v)
    t, m, v = memory if isinstance(memory, tuple) else (0, 0.0, 0.0)
    t, m, v = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7), (t, m, v)


def nadam(rate, p, g, memory):
    # Dozat 2016 with a constant momentum: the mean is taken one step ahead
    t, m, v = memory if isinstance(memory, tuple) else (0, 0.0, 0.0)
    t, m, v = t + 1, 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
    ahead = 0.8 * m / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
    return p - rate * ahead / (np.sqrt(v / (1 - 0.95**t)) + 1e-7), (t, m, v)


@pytest.mark.parametrize(
    ("optimizer", "rate", "rule"),
    [
        ("sgd", 0.1, sgd),
        ("momentum", 0.1, momentum),
        ("rmsprop", 1e-3, rmsprop),
        ("adam", 1e-3, adam),
        ("nadam", 1e-3, nadam),
    ],
)
def test_two_steps_follow_the_rule_in_float64(config, small, optimizer, rate, rule):
    config = dataclasses.replace(config, optimizer=optimizer, learning_rate=rate, dropout=0.0)
    keys, state = start(config)
    params = leaves64(state.params)
    memory = jax.tree.map(np.zeros_like, params)
    for rows in (range(32), range(32, 64)):
        batch = whole_batch(small.train, rows)
        state, metrics = one_step(state, batch, keys, config)
        loss, grads = numpy_gradients(params, np.asarray(batch.pixels), np.asarray(batch.labels))
        assert float(metrics["loss"]) == pytest.approx(loss, abs=1e-5)
        for layer, leaves in params.items():
            for name in leaves:
                leaves[name], memory[layer][name] = rule(
                    rate, leaves[name], grads[layer][name], memory[layer][name]
                )
                np.testing.assert_allclose(state.params[layer][name], leaves[name], atol=1e-5)
    # the rule moved the weights far enough for 1e-5 to tell it from another
    moved = np.abs(
        params["output"]["kernel"] - np.asarray(start(config)[1].params["output"]["kernel"])
    )
    assert moved.max() > 1e-3


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_schedule_falls_over_the_whole_training(name, config, small):
    """Ten steps of SGD on one batch, each as far as the schedule says, whatever the epochs."""
    config = dataclasses.replace(config, schedule=name, dropout=0.0)
    keys, state = start(config)
    batch = whole_batch(small.train, range(32))
    factors = {"constant": lambda p: 1, "linear": lambda p: 1 - p}
    factors["cosine"] = lambda p: (1 + np.cos(np.pi * p)) / 2
    for step_number in range(10):
        grads = numpy_gradients(leaves64(state.params), batch.pixels, batch.labels)[1]
        moved, _ = one_step(state, batch, keys, config, n_steps=10)
        for layer, name_ in (("hidden_0", "kernel"), ("output", "bias")):
            wanted = -0.1 * factors[name](step_number / 10) * grads[layer][name_]
            change = np.asarray(moved.params[layer][name_]) - state.params[layer][name_]
            np.testing.assert_allclose(change, wanted, atol=2e-7)
        state = moved


@pytest.mark.parametrize("rate", [np.float32(0.1), np.float64(0.1), 0.1, jnp.float32(0.1)])
def test_any_number_is_a_learning_rate(rate, config, small):
    keys, state = start(config)
    batch = whole_batch(small.train, range(32))
    moved, _ = train_step(state, batch, keys, rate, 10, config=config)
    wanted, _ = train_step(state, batch, keys, jnp.float32(0.1), 10, config=config)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scan_epoch_equals_the_python_loop(config, small):
    keys, state = start(config)
    for epoch in range(2):
        scanned, metrics = one_epoch(state, small.train, keys, epoch, config)
        indices, masks = step.epoch_order(keys.order, epoch, 300, config.batch_size)
        total = 0.0
        for rows, mask in zip(indices, masks, strict=True):
            batch = Batch(to_float(small.train.images[rows]), small.train.labels[rows], mask)
            state, one = one_step(state, batch, keys, config)
            total += float(one["loss"]) * float(mask.sum())
        for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert float(metrics["loss"]) == pytest.approx(total / 300, rel=1e-5)
        assert int(scanned.step) == (epoch + 1) * 10


def test_a_part_of_an_epoch_is_its_first_steps(config, small):
    """And its loss is the mean over the examples of those."""
    config = dataclasses.replace(config, schedule="linear")
    keys, begun = start(config)
    part, metrics = one_epoch(begun, small.train, keys, 0, config, n_steps=7)
    indices, masks = step.epoch_order(keys.order, 0, 300, config.batch_size)
    state, losses = begun, []
    for rows, mask in zip(indices[:7], masks, strict=False):
        batch = Batch(to_float(small.train.images[rows]), small.train.labels[rows], mask)
        state, one = one_step(state, batch, keys, config, n_steps=7)
        losses.append(float(one["loss"]))
    for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert int(part.step) == 7
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("epochs", "settings", "steps"),
    [(2, {}, 20), (0.7, {}, 7), (0.01, {}, 1), (1.25, {"examples": "half"}, 6), (2.01, {}, 21)],
)
def test_epochs_as_steps(epochs, settings, steps, config):
    config = dataclasses.replace(config, epochs=epochs, **settings)
    assert count_steps(config, step.count_examples(300, config=config)) == steps


def test_steps_are_counted_from_the_examples_in_use(config, small, monkeypatch):
    """Also where a fork uses another share of them; else its schedule would not end."""
    counted = []
    monkeypatch.setattr(step, "example_indices", lambda key, n, *, config: jnp.arange(n // 10))
    noted = lambda config, n: counted.append(n) or count_steps(config, n)  # noqa: E731
    monkeypatch.setattr(fit_module, "count_steps", noted)
    list(fit_module.fit(dataclasses.replace(config, batch_size=10), small, seeds=[0]))
    assert counted == [len(small.train.labels) // 10]


def test_an_epoch_holds_every_example_once():
    indices, mask = step.epoch_order(jax.random.key(0), 3, 60_000, 128)
    assert indices.shape == (469, 128)
    assert mask[:-1].all()
    assert int(mask[-1].sum()) == 96
    assert sorted(np.asarray(indices)[np.asarray(mask) == 1]) == list(range(60_000))
    other, _ = step.epoch_order(jax.random.key(0), 4, 60_000, 128)
    assert not np.array_equal(indices, other)


def test_masked_last_batch_is_the_mean_over_its_96(config, small):
    config = dataclasses.replace(config, dropout=0.0)
    keys, state = start(config)
    padded = whole_batch(small.train, range(128))
    padded = padded._replace(mask=(jnp.arange(128) < 96).astype(jnp.float32))
    alone = whole_batch(small.train, range(96))
    masked, masked_loss = one_step(state, padded, keys, config)
    wanted, wanted_loss = one_step(state, alone, keys, config)
    assert float(masked_loss["loss"]) == pytest.approx(float(wanted_loss["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(masked.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_evaluate_counts_every_image(config, small, monkeypatch):
    _, state = start(config)
    monkeypatch.setattr(step, "EVAL_BATCH", 50)  # 130 images are two blocks and a rest of 30
    metrics, predictions = evaluate(state.params, small.test, config=config)
    p = leaves64(state.params)
    h = small.test.images / 255.0
    for layer in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ p[layer]["kernel"] + p[layer]["bias"], 0)
    logits = h @ p["output"]["kernel"] + p["output"]["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(130), small.test.labels]
    np.testing.assert_array_equal(predictions, logits.argmax(1))
    assert predictions.dtype == jnp.uint8
    assert metrics["correct"].dtype == jnp.int32
    assert int(metrics["correct"]) == (logits.argmax(1) == small.test.labels).sum()
    assert float(metrics["loss"]) == pytest.approx(losses.mean(), rel=1e-5)


def test_streams_are_independent_and_move_alone():
    all_0 = step.run_keys(jnp.array(make_run(0, 1.0).seeds, jnp.uint32))
    data = [tuple(np.asarray(jax.random.key_data(key))) for key in all_0]
    assert len(set(data)) == len(STREAMS)
    for i, stream in enumerate(STREAMS):
        moved = step.run_keys(jnp.array(make_run(5, 1.0, stream).seeds, jnp.uint32))
        same = [
            np.array_equal(jax.random.key_data(a), jax.random.key_data(b))
            for a, b in zip(all_0, moved, strict=True)
        ]
        assert same == [j != i for j in range(len(STREAMS))]


def test_dropout_draws_anew_each_step(config):
    config = dataclasses.replace(config, dropout=0.5, learning_rate=1e-30)
    keys, state = start(config)
    batch = Batch(np.full((4, 784), 200 / 255, np.float32), np.zeros(4, np.int32), jnp.ones(4))
    losses = []
    for _ in range(3):
        state, metrics = one_step(state, batch, keys, config)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_it_learns(config, small):
    keys, state = start(config)
    for epoch in range(15):
        state, _ = one_epoch(state, small.train, keys, epoch, config)
    assert int(evaluate(state.params, small.test, config=config)[0]["correct"]) > 120
