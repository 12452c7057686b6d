"""Each ingredient of a training against a few lines of NumPy; all of them at once in many runs."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax

from mlp_jax.errors import UserError
from mlp_jax.training import losses, model, optim, step
from mlp_jax.training.arrays import Split, hold_out, make_dataset
from mlp_jax.training.config import RECIPES, Config, OptimizerName, ScheduleName
from mlp_jax.training.fit import fit
from mlp_jax.training.losses import Batch
from mlp_jax.training.model import MLP
from mlp_jax.training.parallel import Placement
from mlp_jax.training.run import Streams, make_run

EVERYTHING = {
    "schedule": "cosine",
    "warmup": 0.25,
    "cycles": 2,
    "init": "he",
    "label_smoothing": 0.1,
    "weight_decay": 0.01,
    "max_norm": 2.0,
    "ema": 0.9,
    "input_dropout": 0.1,
    "input_noise": 0.1,
    "mixup": 0.4,
    "vat": 1.0,
    "rotation": 10.0,
    "shear": 0.1,
    "scale": 0.1,
    "shift": 1.0,
    "elastic": 0.5,
    "examples": "half",
}


def make_keys(seed=0):
    return step.run_keys(jnp.array(make_run(seed, 1.0).seeds, jnp.uint32))


def make_batch(n=32, n_kept=32, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(size=(n, 784)).astype(np.float32)
    return Batch(pixels, np.arange(n, dtype=np.int32) % 4, (np.arange(n) < n_kept) * np.float32(1))


def one_step(state, config, batch=None, n_steps=10):
    args = (state, batch or make_batch(), make_keys(), config.learning_rate, n_steps)
    return jax.jit(step.train_step, static_argnames="config")(*args, config=config)[0]


class Recorder:
    """Stands in for the network: its logits are its input."""

    def apply(self, variables, pixels, *, train, rngs):
        assert train
        return pixels


def pixels_seen(monkeypatch, batch, **settings):
    """What the network would see in training, through a loss that reports its logits."""
    seen = []
    monkeypatch.setattr(losses, "MLP", lambda config: Recorder())
    monkeypatch.setattr(
        losses,
        "example_losses",
        lambda logits, targets, config: seen.append((logits, targets)) or jnp.sum(logits, 1),
    )
    losses.loss_fn({}, batch, make_keys(), config=Config(n_classes=4, **settings))
    return [np.asarray(each) for each in seen[0]]


def test_warmup_by_hand():
    config = Config(schedule="linear", warmup=0.2)
    factors = [float(optim.schedule(jnp.float32(p), config=config)) for p in (0, 0.1, 0.2, 0.6)]
    np.testing.assert_allclose(factors, [0, 0.5, 1, 0.5], atol=1e-6)


@pytest.mark.parametrize("cycles", [1, 2, 3, 5, 22, 61, 1000])
@pytest.mark.parametrize("n_steps", [61, 2345, 93_800, 700_000_000])
def test_each_cycle_begins_at_its_first_step(cycles, n_steps):
    """Alone and vmapped, where XLA divides differently."""
    steps = [k * n_steps // cycles + i for k in range(cycles) for i in (-1, 0, 1)]
    steps = np.array([step for step in steps if 0 <= step < n_steps])
    wanted = (steps * cycles % n_steps if cycles > 1 else steps) / n_steps

    def progress(step, n_steps):
        return optim.cycle_progress(step, n_steps, config=Config(cycles=cycles))

    args = jnp.asarray(steps, jnp.int32), jnp.int32(n_steps)
    found = jax.jit(jax.vmap(progress, (0, None)))(*args)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    one = jax.jit(progress)(args[0][-1], args[1])
    np.testing.assert_allclose(one, wanted[-1], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_shrinks_kernels_by_the_rate_alone(config, optimizer):
    """Decoupled from the gradient: the difference that it makes to a step is known."""
    plain = dataclasses.replace(config, optimizer=optimizer)
    decayed = dataclasses.replace(plain, weight_decay=0.5)
    start = step.init_state(make_keys(), config=plain)
    a = one_step(start, plain)
    b = one_step(step.init_state(make_keys(), config=decayed), decayed)
    for layer, leaves in start.params.items():
        kernels = (a.params[layer]["kernel"], b.params[layer]["kernel"])
        wanted = 0.1 * 0.5 * leaves["kernel"]
        np.testing.assert_allclose(kernels[0] - kernels[1], wanted, atol=1e-6)
        np.testing.assert_array_equal(a.params[layer]["bias"], b.params[layer]["bias"])


def test_max_norm_bounds_the_weights_into_hidden_units(config):
    free = step.init_state(make_keys(), config=config).params
    for layer in ("hidden_0", "hidden_1"):
        before = np.asarray(free[layer]["kernel"])
        norms = np.linalg.norm(before, axis=0)
        bound = float(np.median(norms))
        bounded = optim.clip_norms(free, dataclasses.replace(config, max_norm=bound))
        wanted = before * np.minimum(1, bound / norms)
        np.testing.assert_allclose(bounded[layer]["kernel"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(bounded["output"]["kernel"], free["output"]["kernel"])
    config = dataclasses.replace(config, max_norm=0.5)
    moved = one_step(step.init_state(make_keys(), config=config), config)
    assert np.linalg.norm(moved.params["hidden_0"]["kernel"], axis=0).max() < 0.5 + 1e-6


def test_smoothed_cross_entropy_and_squared_hinge():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1], np.int32)
    one_hot = np.eye(4)[labels]
    smooth = 0.9 * one_hot + 0.1 / 4
    signs = 2 * one_hot - 1
    wanted = {
        "softmax": -(smooth * log_softmax(logits, axis=1)).sum(1),
        "squared-hinge": (np.maximum(0, 1 - signs * logits) ** 2).sum(1),
    }
    for loss, smoothing in (("softmax", 0.1), ("squared-hinge", 0.0)):
        config = Config(loss=loss, label_smoothing=smoothing, n_classes=4)
        for targets in (labels, one_hot.astype(np.float32)):
            made = losses.example_losses(logits, targets, config=config)
            np.testing.assert_allclose(made, wanted[loss], rtol=1e-5)


def test_the_loss_that_is_scored_is_not_smoothed(config, small):
    params = step.init_state(make_keys(), config=config).params
    smoothed = dataclasses.replace(config, label_smoothing=0.3)
    a, b = (step.evaluate(params, small.test, config=c)[0]["loss"] for c in (config, smoothed))
    assert float(a) == float(b)


def test_the_mean_of_the_weights_is_what_is_scored(config):
    config = dataclasses.replace(config, ema=0.7, dropout=0.0)
    state = step.init_state(make_keys(), config=config)
    mean = np.asarray(state.params["hidden_0"]["kernel"], np.float64)
    for t in range(12):
        state = one_step(state, config, make_batch(seed=t))
        decay = min(0.7, (1 + t) / (10 + t))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["hidden_0"]["kernel"])
        np.testing.assert_allclose(step.eval_params(state)["hidden_0"]["kernel"], mean, atol=1e-6)
    assert np.abs(mean - state.params["hidden_0"]["kernel"]).max() > 1e-4


def test_input_noise_has_the_sd_it_is_given(monkeypatch):
    batch = make_batch(128)
    noise = pixels_seen(monkeypatch, batch, input_noise=0.3)[0] - batch.pixels
    assert noise.std() == pytest.approx(0.3, rel=0.01)
    assert abs(noise.mean()) < 0.005


def test_input_dropout_drops_pixels_and_scales_the_others():
    config = Config(hidden=(8,), dropout=0.0, input_dropout=0.25)
    model, ones = MLP(config), jnp.ones((50, 784))
    variables = model.init(jax.random.key(0), ones, train=False)
    rngs = {"dropout": jax.random.key(1)}
    options = {"capture_intermediates": True, "mutable": "intermediates"}
    _, captured = model.apply(variables, ones, train=True, rngs=rngs, **options)
    seen = np.asarray(captured["intermediates"]["input_dropout"]["__call__"][0])
    assert set(np.unique(seen)) == {0, np.float32(1 / 0.75)}
    assert (seen == 0).mean() == pytest.approx(0.25, abs=0.01)
    _, captured = model.apply(variables, ones, train=False, **options)
    np.testing.assert_array_equal(captured["intermediates"]["input_dropout"]["__call__"][0], ones)


def test_mixup_mixes_pixels_and_targets_in_one_share(monkeypatch):
    batch = make_batch(32, n_kept=24)
    pixels, targets = pixels_seen(monkeypatch, batch, mixup=1.0)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    one_hot, found = np.eye(4)[batch.labels], []
    for i in range(32):
        fits = []  # which example it was mixed with, and in what share
        for j in range(24):
            gap = batch.pixels[j] - batch.pixels[i]
            share = 0 if i == j else (pixels[i] - batch.pixels[i]) @ gap / (gap @ gap)
            error = np.abs(batch.pixels[i] + share * gap - pixels[i]).max()
            fits.append((error, share, j))
        error, share, partner = min(fits)
        assert error < 1e-5  # none is mixed with the padding
        wanted = (1 - share) * one_hot[i] + share * one_hot[partner]
        np.testing.assert_allclose(targets[i], wanted, atol=1e-4)
        found.append(share)
    mixed = [share for share in found if share > 1e-6]
    assert len(mixed) > 12
    np.testing.assert_allclose(mixed, mixed[0], atol=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_the_share_of_a_mix_has_its_distribution(alpha):
    batch = Batch(jnp.eye(2), jnp.arange(2), jnp.ones(2))
    config = Config(mixup=alpha, n_classes=2)
    keys = jax.random.split(jax.random.key(0), 1000)
    pixels, _ = jax.vmap(lambda key: losses.mix(*batch, key, config=config))(keys)
    mixed = np.asarray(pixels[:, 0, 1])  # 0 where the partner is the example itself
    assert (mixed > 0).mean() == pytest.approx(0.5, abs=0.06)
    assert stats.kstest(mixed[mixed > 0], stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_the_virtual_adversarial_loss_is_part_of_the_loss(monkeypatch):
    batch, config = make_batch(32, n_kept=24), Config(dropout=0.0, n_classes=4)
    params = step.init_state(make_keys(), config=config).params

    def loss(vat):
        settings = dataclasses.replace(config, vat=vat)
        return losses.loss_fn(params, batch, make_keys(), config=settings)[0]

    def fake(apply, pixels, logits, key, radius):
        np.testing.assert_allclose(apply(pixels), logits, rtol=1e-5)
        return radius * jnp.arange(len(pixels))

    assert loss(1.0) > loss(0.5) > loss(0.0)
    monkeypatch.setattr(losses, "virtual_adversarial_losses", fake)
    assert float(loss(2.0) - loss(0.0)) == pytest.approx(2 * np.arange(24).mean(), rel=1e-5)


def test_virtual_adversarial_direction_of_a_linear_classifier():
    """Its Hessian is W (diag(p) - p p') W', and the divergence is a sum over ten classes."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(784, 10)) / 10
    pixels = rng.uniform(size=(5, 784)).astype(np.float32)
    key = jax.random.key(3)

    def apply(pixels):
        return pixels @ weights.astype(np.float32)

    made = losses.virtual_adversarial_losses(apply, pixels, apply(pixels), key, radius=0.5)
    starts = np.asarray(jax.random.normal(key, pixels.shape), np.float64)
    for x, start, divergence in zip(pixels.astype(np.float64), starts, made, strict=True):
        log_p = log_softmax(x @ weights)
        p = np.exp(log_p)
        # the gradient of the divergence at a small step along the start: W (q - p)
        d = weights @ (softmax((x + 0.1 * start / np.linalg.norm(start)) @ weights) - p)
        moved = log_softmax((x + 0.5 * d / np.linalg.norm(d)) @ weights)
        assert float(divergence) == pytest.approx((p * (log_p - moved)).sum(), rel=1e-3)


def compare_orders(config, data, seeds):
    """Mean accuracy on pixels in a fixed random order less that in their own, and its SE."""
    order = np.random.default_rng(0).permutation(784)
    train, test = (s._replace(images=s.images[:, order]) for s in (data.train, data.test))
    shuffled = make_dataset(data.name, train, test, data.n_classes)
    (*_, own), (*_, other) = (fit(config, each, seeds=seeds) for each in (data, shuffled))
    difference = other.test_accuracy.mean() - own.test_accuracy.mean()
    variances = [each.test_accuracy.var(ddof=1) for each in (own, other)]
    return difference, np.sqrt(sum(variances) / len(seeds))


def test_the_order_of_the_pixels_matters_to_deformed_images_alone(config, small):
    """Trained in another order, runs of `best` are as accurate in distribution."""
    changes = {"hidden": (16, 8), "batch_size": 32, "epochs": 4, "ema": 0.9}
    best, augmented = (
        dataclasses.replace(RECIPES[name], **changes) for name in ("best", "best-augmented")
    )
    difference, error = compare_orders(best, small, range(60))
    assert abs(difference) < 3 * error < 0.1
    difference, error = compare_orders(augmented, small, range(20))
    assert difference < -5 * error


@pytest.mark.network
def test_best_is_as_accurate_with_the_pixels_in_another_order(mnist):
    config = dataclasses.replace(RECIPES["best"], epochs=1)
    difference, error = compare_orders(config, mnist, range(8))
    assert abs(difference) < 3 * error < 0.003


def test_he_weights_have_their_variance(config):
    he = step.init_state(make_keys(), config=Config(init="he")).params
    for layer, n_in in (("hidden_0", 784), ("hidden_1", 512)):
        kernel = np.asarray(he[layer]["kernel"])
        assert kernel.std() == pytest.approx(np.sqrt(2 / n_in), rel=0.01)


def test_the_data_stream_decides_which_examples_are_used():
    keys = Streams(*(jax.random.key(seed) for seed in range(5)))
    chosen = {
        name: np.asarray(step.example_indices(keys.data, 60, config=Config(examples=name)))
        for name in ("all", "half", "bootstrap")
    }
    assert chosen["all"].tolist() == list(range(60))
    assert len(chosen["half"]) == len(set(chosen["half"])) == 30
    assert len(chosen["bootstrap"]) == 60
    # 1 - 1/e of the examples are drawn at least once
    assert 30 < len(set(chosen["bootstrap"])) < 46
    other = step.example_indices(jax.random.key(9), 60, config=Config(examples="half"))
    assert set(np.asarray(other)) != set(chosen["half"])


def test_held_out_examples_are_scored_and_not_trained_on(small):
    by_class = np.argsort(small.train.labels, kind="stable")
    train = Split(*(array[by_class] for array in small.train))
    with pytest.raises(UserError, match="of class 3: shuffle them"):
        hold_out(make_dataset("mine", train, small.test, 4))
    held = hold_out(small)
    assert (len(held.train.labels), len(held.test.labels)) == (250, 50)
    np.testing.assert_array_equal(held.test.images, small.train.images[250:])
    np.testing.assert_array_equal(held.train.images, small.train.images[:250])
    assert held.split == "validation"
    assert held.fingerprint != small.fingerprint


@pytest.mark.parametrize("changes", [{}, {"loss": "squared-hinge", "label_smoothing": 0.0}])
def test_with_everything_on_a_row_is_still_the_single_run(changes, config, small):
    config = dataclasses.replace(config, optimizer="adam", learning_rate=1e-3, **EVERYTHING)
    config = dataclasses.replace(config, **changes)
    places = [Placement(tuple(jax.devices()[:n]), 1) for n in (2, 1)]
    *_, together = fit(config, small, seeds=range(3), placement=places[0])
    *_, alone = fit(config, small, seeds=[1], placement=places[1])
    for a, b in zip(
        jax.tree.leaves(together.fetch_params()), jax.tree.leaves(alone.fetch_params()), strict=True
    ):
        np.testing.assert_array_equal(a[1], b[0])
    np.testing.assert_array_equal(together.predictions[1], alone.predictions[0])
    losses_seen = np.asarray(together.history["train_loss"])
    assert np.isfinite(losses_seen).all()
    assert len(set(losses_seen[:, 0])) == 3


@pytest.mark.parametrize("stream", ["augment", "data"])
def test_a_stream_moves_alone(stream, config, small):
    """Its seed changes the training where the setting is on, and nothing where it is off."""
    on = {"augment": {"shift": 2.0}, "data": {"examples": "half"}}[stream]
    for settings, n_distinct in (({}, 1), (on, 2)):
        runs = [make_run(seed, 0.1, stream) for seed in (0, 1)]
        trained = fit(dataclasses.replace(config, epochs=1, **settings), small, runs)
        assert len(set(next(iter(trained)).history["train_loss"][:, 0])) == n_distinct


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, r"ema must be in \[0, 1\), not 1.0"),
        ({"label_smoothing": -0.1}, r"label smoothing must be in \[0, 1\), not -0.1"),
        ({"weight_decay": -1.0}, "weight decay must be at least 0, not -1.0"),
        ({"vat": float("nan")}, "vat must be at least 0, not nan"),
        ({"elastic_sigma": 0.0}, "elastic sigma must be at least 1, not 0.0"),
        ({"cycles": 0}, "cycles must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_bfloat16_products_round_their_operands_and_sum_in_float32():
    rng = np.random.default_rng(0)
    x, w, d = (rng.normal(size=size).astype(np.float32) for size in ((32, 64), (64, 16), (32, 16)))

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)

    def product(x, w):
        return model.rounded_product(x, w, (((1,), (0,)), ((), ())))

    made, gradients = jax.vjp(product, x, w)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, rounded(x) @ rounded(w), rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients(d), (d @ rounded(w).T, rounded(x).T @ d), strict=True):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, rounded(wanted), rtol=0.02, atol=0.02)
    config = Config(hidden=(16, 8), n_classes=4, dropout=0)
    params = step.init_state(make_keys(), config=config).params
    found = {}
    for products in ("float32", "bfloat16"):
        changed = dataclasses.replace(config, products=products)
        found[products] = losses.loss_fn(params, make_batch(), make_keys(), config=changed)[0]
    assert 0 < abs(found["bfloat16"] - found["float32"]) < 0.01


def test_rmsprop_as_keras_had_it_adds_epsilon_outside_of_the_root():
    g = {"w": jnp.array([1e-7, 1e-3, -2.0])}
    for name, scale in (
        ("rmsprop", lambda v: 1 / np.sqrt(v + 1e-7)),
        ("rmsprop-outside", lambda v: 1 / (np.sqrt(v) + 1e-7)),
    ):
        rule = optim.OPTIMIZERS[name]()
        made, _ = rule.update(g, rule.init(g))
        np.testing.assert_allclose(made["w"], g["w"] * scale(0.1 * g["w"] ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nesterov", optax.sgd(0.1, 0.9, nesterov=True)),
        ("nadam", optax.nadam(0.1, b1=0.8, b2=0.95, eps=1e-7)),
        ("adabelief", optax.adabelief(0.1)),
        ("adadelta", optax.adadelta(0.1)),
        ("adagrad", optax.adagrad(0.1)),
        ("adamax", optax.adamax(0.1)),
        ("adan", optax.adan(0.1)),
        ("amsgrad", optax.amsgrad(0.1)),
        ("lion", optax.lion(0.1, weight_decay=0)),
        ("muon", optax.contrib.muon(0.1)),
        ("novograd", optax.novograd(0.1)),
        ("radam", optax.radam(0.1)),
        ("sign-sgd", optax.sign_sgd(0.1)),
        ("sm3", optax.sm3(0.1)),
        ("yogi", optax.yogi(0.1)),
    ],
)
def test_a_rule_times_the_rate_is_optaxs_optimizer(name, wanted):
    rule, params = optim.make_optimizer(Config(optimizer=name)), {"w": jnp.array([[0.5, -2.0]])}
    states = rule.init(params), wanted.init(params)
    for gradient in ([1.0, -3.0], [0.01, 2.0], [-1.0, 0.5]):
        grads = {"w": jnp.array([gradient])}
        ours, theirs = (
            r.update(grads, s, params) for r, s in zip((rule, wanted), states, strict=True)
        )
        np.testing.assert_allclose(-0.1 * ours[0]["w"], theirs[0]["w"], rtol=1e-5, atol=1e-7)
        states = ours[1], theirs[1]


@pytest.mark.parametrize("name", ["adan", "muon", "novograd", "sm3"])  # states unlike Adam's
def test_a_row_of_each_rule_is_the_single_run_and_resumes(name, config, small):
    config = dataclasses.replace(config, optimizer=name, epochs=2)
    runs = [make_run(seed, 0.01) for seed in (0, 1)]
    training = fit(config, small, runs)
    snapshot = next(training).snapshot()
    (together,) = training
    (resumed,) = fit(config, small, runs, start=snapshot)
    *_, alone = fit(config, small, runs[1:])
    for predicted in (resumed.predictions[1], alone.predictions[0]):
        np.testing.assert_array_equal(together.predictions[1], predicted)
    first, last = together.history["train_loss"][1]
    assert [first, last] == alone.history["train_loss"][0].tolist()
    assert last < first


def test_each_name_has_its_entry():
    for names, entries in ((OptimizerName, optim.OPTIMIZERS), (ScheduleName, optim.SCHEDULES)):
        assert get_args(names) == tuple(entries)
