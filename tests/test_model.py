"""The network's names, shapes and initial values: a changed default shows here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_jax.training import model
from mlp_jax.training.arrays import N_PIXELS
from mlp_jax.training.config import Config
from mlp_jax.training.model import MLP, count_parameters, parameter_table, predict

GOLDEN = """\
hidden_0/bias (512,) float32 zeros
hidden_0/kernel (784, 512) float32 glorot_uniform
hidden_1/bias (512,) float32 zeros
hidden_1/kernel (512, 512) float32 glorot_uniform
output/bias (10,) float32 zeros
output/kernel (512, 10) float32 glorot_uniform
"""

# the first weights of each kernel from key 0: a renamed layer or another PRNG changes them
FIRST_WEIGHTS = {
    "hidden_0": [-0.05167448, 0.04451476, -0.05669378],
    "hidden_1": [0.01237229, -0.06313173, 0.06648132],
    "output": [-0.07904166, -0.02769784, -0.01211031],
}

TABLE = """\
layer                     output shape      parameters
hidden_0 (Dense, ReLU)    (batch, 512)         401,920
dropout_0 (0.2)           (batch, 512)               0
hidden_1 (Dense, ReLU)    (batch, 512)         262,656
dropout_1 (0.2)           (batch, 512)               0
output (Dense)            (batch, 10)            5,130
total                     2.55 MiB             669,706"""


@pytest.fixture(scope="module")
def params():
    x = jnp.zeros((1, N_PIXELS))
    return MLP(Config()).init(jax.random.key(0), x, train=False)["params"]


def initialiser(leaf) -> str:
    """The distribution that a leaf was drawn from, told from its values."""
    if not leaf.any():
        return "zeros"
    limit = np.sqrt(6 / sum(leaf.shape))
    n = leaf.size
    # of n uniform draws the largest falls short of the limit by 1 / n of it, more or less
    reaches = limit * (1 - 20 / n) < np.abs(leaf).max() <= limit
    even = abs(leaf.var() / (limit**2 / 3) - 1) < 5 * np.sqrt(0.8 / n)
    return "glorot_uniform" if reaches and even else "something else"


def test_names_shapes_and_initialisers(params):
    lines = [
        f"{layer}/{name} {leaf.shape} {leaf.dtype} {initialiser(np.asarray(leaf))}\n"
        for layer, leaves in sorted(params.items())
        for name, leaf in sorted(leaves.items())
    ]
    assert "".join(lines) == GOLDEN
    assert count_parameters(params) == 401_920 + 262_656 + 5_130 == 669_706


def test_seed_decides_the_weights(params):
    for layer, first in FIRST_WEIGHTS.items():
        np.testing.assert_allclose(params[layer]["kernel"][0, :3], first, rtol=1e-6)


def test_table(params):
    assert parameter_table(Config(), params) == TABLE


def test_dropout_off_is_deterministic_and_on_keeps_the_mean(params):
    net = MLP(Config(dropout=0.5))
    x = jax.random.uniform(jax.random.key(1), (4, N_PIXELS))

    def logits(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return net.apply({"params": params}, x, train=train, rngs=rngs)

    np.testing.assert_array_equal(logits(1, train=False), logits(2, train=False))
    assert not np.array_equal(logits(1, train=True), logits(2, train=True))


def test_dropout_zeroes_its_share_and_rescales_the_rest():
    net = MLP(Config(hidden=(5000,), dropout=0.2))
    x = jnp.ones((1, N_PIXELS))
    params = net.init(jax.random.key(0), x, train=False)["params"]
    params["hidden_0"] = jax.tree.map(jnp.zeros_like, params["hidden_0"])
    params["hidden_0"]["bias"] += 1.0  # every hidden unit is 1
    params["output"] = jax.tree.map(jnp.ones_like, params["output"])
    total = (
        net.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(3)})[0, 0] - 1
    )
    kept = round(float(total) * 0.8)  # each survivor counts 1 / 0.8
    assert abs(kept - 4000) < 5 * np.sqrt(5000 * 0.2 * 0.8)
    assert float(total) == pytest.approx(kept / 0.8, rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_relu_and_dropout_are_flax_own_bit_for_bit(rate):
    """Values and gradients, from draws that depend on the layer's name alone."""

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(rate, name="dropout_0")(nn.relu(x), deterministic=False)

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return model.ReluDropout(rate, name="dropout_0")(x, train=True)

    x = jax.random.normal(jax.random.key(1), (64, 512)).at[0, :9].set(0).at[1].set(jnp.inf)
    x = x.at[2].set(jnp.nan).at[3].set(-jnp.inf)
    theirs, ours = (
        jax.vjp(lambda x, net=net: net.apply({}, x, rngs={"dropout": jax.random.key(3)}), x)
        for net in (Flax(), Ours())
    )
    np.testing.assert_array_equal(theirs[0], ours[0])
    known = ~jnp.isnan(x)  # the gradient at a NaN is 0 in one and not in the other
    gradients = (jnp.where(known, vjp(theirs[0])[0], 0) for _, vjp in (theirs, ours))
    np.testing.assert_array_equal(*gradients)


def test_the_narrow_product_has_both_derivatives(params):
    """Forward and reverse mode, and one over the other, agree with the plain product."""
    key_x, key_w = jax.random.split(jax.random.key(5))
    x, w = jax.random.normal(key_x, (7, 16)), jax.random.normal(key_w, (16, 3))

    def loss(product):
        return lambda x, w: jnp.sum(jnp.tanh(product(x, w)) ** 2)

    narrow, plain = loss(lambda x, w: model.narrow_product(x, w, None)), loss(jnp.matmul)
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        np.testing.assert_allclose(
            derivative(narrow, argnums=1)(x, w), derivative(plain, argnums=1)(x, w), rtol=1e-4
        )


def test_predict_takes_images_as_they_are_and_committees(params):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    x = images.reshape(5, 784) / np.float32(255)
    wanted = MLP(Config()).apply({"params": params}, x, train=False)
    logits = predict(params, images, config=Config())
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, predict(params, images.reshape(5, 784), config=Config()))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = predict(stacked, images, config=Config())
    assert both.shape == (2, 5, 10)
    np.testing.assert_allclose(both[0], logits, rtol=1e-4, atol=1e-5)
