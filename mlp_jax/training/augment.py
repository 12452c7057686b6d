"""Random deformation of the training images: affine, and elastic as a smooth field of shifts.

The key of a deformation is folded from (seed, augment stream, epoch, image), so it depends neither
on the order of the examples nor on the batch size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlp_jax.training.arrays import N_PIXELS
from mlp_jax.training.config import Config

SIDE = 28


def deform_batch(
    images: jax.Array, indices: jax.Array, key: jax.Array, *, config: Config
) -> jax.Array:
    """Uint8 images as float32 [batch, 784] in [0, 1], each deformed by its own key.

    `key` is the epoch's, `indices` are those of the images in the training set.
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    positions = jax.vmap(lambda key: sampling_positions(key, config=config))(keys)
    # without the barrier XLA recomputes them for each use
    return jax.vmap(sample)(images, lax.optimization_barrier(positions))


def sample(image: jax.Array, positions: jax.Array) -> jax.Array:
    """Pixels [784] in [0, 1], bilinear at `positions` [2, 28, 28] of a uint8 image [784].

    Beyond the border they fall to 0 over one pixel.
    """
    rows, columns = jnp.reshape(positions, (2, N_PIXELS))
    (row, down, near_row), (column, right, near_column) = locate(rows), locate(columns)
    # Each word packs the 2 x 2 pixels that start at its own: on CPU the gather takes most of the
    # time, and this needs one instead of four.
    pixels, n_words = image.astype(jnp.uint32), N_PIXELS - SIDE - 1
    starts = (0, 1, SIDE, SIDE + 1)
    words: Any = sum(pixels[start : start + n_words] << (8 * i) for i, start in enumerate(starts))
    word = words[SIDE * row + column]
    top_left, top_right, bottom_left, bottom_right = (
        (word >> (8 * i) & 255).astype(jnp.int32).astype(jnp.float32) for i in range(4)
    )
    top = top_left + right * (top_right - top_left)
    bottom = bottom_left + right * (bottom_right - bottom_left)
    return (top + down * (bottom - top)) * (near_row * near_column / 255)


def locate(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For positions along an axis: the pixel before each, the fraction of the way to the next, and
    the fraction inside the border."""
    inside = jnp.clip(x, 0, SIDE - 1)
    before = jnp.minimum(inside, SIDE - 2).astype(jnp.int32)
    return before, inside - before, jnp.maximum(0, 1 - jnp.abs(x - inside))


def sampling_positions(key: jax.Array, *, config: Config) -> jax.Array:
    """Source positions of the pixels of a deformed image: rows and columns, [2, 28, 28].

    Rotation, shear, both scales and both shifts are uniform. The elastic shifts have the covariance
    of noise smoothed by a Gaussian of width `elastic_sigma`; as in Simard, Steinkraus and Platt
    (2003) the noise is uniform, but the SD of the result is fixed.
    """
    bumps = smooth_basis(config.elastic_sigma)
    n_knots = bumps.shape[1]
    n_weights = 2 * n_knots**2 if config.elastic else 0
    # random bits are expensive on CPU: 32 per affine parameter, 8 per elastic one
    bits = jax.random.bits(key, (6 + -(-n_weights // 4),))
    draws = lax.bitcast_convert_type(bits[:6], jnp.int32).astype(jnp.float32) / 2.0**31
    rotation, shear, *scales_and_shift = draws  # in [-1, 1]
    scales, shift = jnp.split(jnp.stack(scales_and_shift), 2)
    angle = jnp.deg2rad(config.rotation) * rotation
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    stretch = jnp.diag(1 + config.scale * scales).at[0, 1].set(config.shear * shear)
    centre = (SIDE - 1) / 2
    grid = np.mgrid[:SIDE, :SIDE].astype(np.float32) - centre
    positions = jnp.einsum("ab,bij->aij", turn @ stretch, grid) + centre
    positions += config.shift * shift[:, None, None]
    if config.elastic:
        weights = jnp.ravel(lax.bitcast_convert_type(bits[6:], jnp.int8))[:n_weights]
        weights = (weights + 0.5) / math.sqrt((2**16 - 1) / 12)  # their SD, so that it is 1
        weights = jnp.reshape(weights, (2, n_knots, n_knots))
        positions += config.elastic * jnp.einsum("ik,akl,jl->aij", bumps, weights, bumps)
    return positions


def smooth_basis(sigma: float) -> np.ndarray:
    """Gaussian bumps [28, knots] along an axis, `sigma` pixels wide and apart, as unit rows.

    A sum of bumps with standard normal weights is smooth with SD 1 in each pixel, from far fewer
    random numbers than smoothing a noise image takes.
    """
    n_knots = int(np.ceil(SIDE / sigma)) + 2  # one beyond either border
    knots = (np.arange(n_knots) - (n_knots - 1) / 2) * sigma + (SIDE - 1) / 2
    bumps = np.exp(-((np.arange(SIDE)[:, None] - knots) ** 2) / (2 * sigma**2))
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)
