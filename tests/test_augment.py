"""Deformations: positions by hand, sampling as SciPy does it, and one key an image and epoch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mlp_jax.training import augment, step
from mlp_jax.training.config import Config
from mlp_jax.training.run import Streams

STRONG = Config(rotation=15.0, shear=0.15, scale=0.15, shift=1.5, elastic=0.7)
CENTRE = 13.5

deform_batch, sampling_positions = (
    jax.jit(function, static_argnames="config")
    for function in (augment.deform_batch, augment.sampling_positions)
)


def digit():
    """A bright bar off the centre, smooth enough to be moved by parts of a pixel."""
    image = np.zeros((28, 28))
    image[5:20, 9:13] = 255
    return ndimage.gaussian_filter(image, 1).astype(np.uint8)


def affine_by_hand(key, config):
    """Sampling positions [2, 28, 28] from the same draws, pixel by pixel."""
    draws = np.asarray(jax.random.bits(key, (6,))).astype(np.int32) / 2**31
    angle, shear = np.deg2rad(config.rotation) * draws[0], config.shear * draws[1]
    scale_rows, scale_columns = 1 + config.scale * draws[2:4]
    positions = np.empty((2, 28, 28))
    for row in range(28):
        for column in range(28):
            y, x = row - CENTRE, column - CENTRE
            y, x = scale_rows * y + shear * x, scale_columns * x
            y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
            positions[:, row, column] = np.array([y, x]) + CENTRE + config.shift * draws[4:]
    return positions


@pytest.mark.parametrize("field", ["rotation", "shear", "scale", "shift"])
def test_affine_positions_by_hand(field):
    config = Config(**{field: getattr(STRONG, field)})
    for seed in range(3):
        key = jax.random.key(seed)
        made = sampling_positions(key, config=config)
        np.testing.assert_allclose(made, affine_by_hand(key, config), atol=1e-4)


def test_a_deformed_image_is_what_scipy_samples():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (28, 28), np.uint8)  # up to the border
    for seed, image in enumerate([digit(), digit(), noise, noise]):
        key, index = jax.random.key(seed), jnp.array([5])
        made = deform_batch(jnp.ravel(image)[None], index, key, config=STRONG)
        positions = np.asarray(sampling_positions(jax.random.fold_in(key, 5), config=STRONG))
        # grid-constant: down to 0 over one pixel beyond the border
        pixels = image / 255
        wanted = ndimage.map_coordinates(pixels, positions, order=1, mode="grid-constant")
        np.testing.assert_allclose(np.reshape(made, (28, 28)), wanted, atol=1e-5)
        assert np.abs(wanted - pixels).max() > 0.2


def test_elastic_shifts_have_their_sd_and_are_smooth():
    config = Config(elastic=0.7, elastic_sigma=4.0)
    keys = jax.random.split(jax.random.key(0), 2000)
    grid = sampling_positions(keys[0], config=Config())
    positions = jax.vmap(lambda key: sampling_positions(key, config=config))(keys)
    shifts = np.asarray(positions) - np.asarray(grid)
    np.testing.assert_allclose(shifts.std(axis=0), 0.7, rtol=0.08)
    # white noise smoothed by a Gaussian of width s correlates by exp(-d^2 / 4 s^2) over d pixels
    for d in (1, 4, 8):
        pairs = shifts[:, 0, 14, 10], shifts[:, 0, 14, 10 + d]
        assert np.corrcoef(*pairs)[0, 1] == pytest.approx(np.exp(-(d**2) / 64), abs=0.08)
    assert abs(np.corrcoef(shifts[:, 0, 14, 14], shifts[:, 1, 14, 14])[0, 1]) < 0.08


def test_an_image_is_deformed_alike_in_any_batch_and_otherwise_in_any_epoch():
    key, images = jax.random.key(7), jnp.stack([jnp.ravel(digit())] * 5)
    indices = jnp.array([3, 8, 59_999, 0, 8])
    made = deform_batch(images, indices, key, config=STRONG)
    np.testing.assert_allclose(made[1], made[4], atol=1e-6)
    assert min(np.abs(made[i] - made[1]).max() for i in (0, 2, 3)) > 0.2
    turned = deform_batch(images[:3], indices[2::-1], key, config=STRONG)
    np.testing.assert_allclose(turned, made[2::-1], atol=1e-6)
    later = deform_batch(images, indices, jax.random.fold_in(key, 1), config=STRONG)
    assert np.abs(later - made).max() > 0.2


def test_neither_the_order_nor_the_batches_of_an_epoch_change_its_images(monkeypatch, small):
    def look(state, batch, *_, config):
        light = batch.labels @ jnp.square(batch.pixels).sum(axis=1, where=batch.mask[:, None] > 0)
        return state, {"light": light / batch.mask.sum()}

    def mean_light(order=0, augment=0, epoch=0, batch_size=32):
        keys = [jax.random.key(seed) for seed in (0, order, 0, augment, 0)]
        config = dataclasses.replace(STRONG, batch_size=batch_size)
        given = 0, train, Streams(*keys), 0.1, epoch, 10**6
        return float(step.train_epoch(*given, config=config)[1]["light"])

    train = jax.tree.map(jnp.asarray, small.train)
    monkeypatch.setattr(step, "train_step", look)
    assert mean_light(order=1) == pytest.approx(mean_light(), rel=1e-5)
    assert mean_light(batch_size=70) == pytest.approx(mean_light(), rel=1e-5)
    for changes in ({"augment": 1}, {"epoch": 1}):
        assert mean_light(**changes) != pytest.approx(mean_light(), rel=1e-4)


def test_no_strength_is_no_deformation():
    images = jnp.ravel(digit())[None]
    made = deform_batch(images, jnp.array([0]), jax.random.key(0), config=Config())
    np.testing.assert_allclose(made, images / 255, rtol=1e-6)
    assert not Config().augments
    assert STRONG.augments
