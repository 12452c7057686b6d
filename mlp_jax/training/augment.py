"""Random deformation of the training images: affine, and elastic as a smooth field of shifts.

The key of a deformation is folded from (seed, augment stream, epoch, image), so an image is
deformed alike in an epoch whatever the order of the examples and the batch size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from mlp_jax.training.arrays import N_PIXELS
from mlp_jax.training.config import Config

SIDE = 28


def deform_batch(
    pixels: jax.Array, indices: jax.Array, key: jax.Array, *, config: Config
) -> jax.Array:
    """Float32 [batch, 784], each image deformed by the key of its index; `key` is the epoch's."""
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    return jax.vmap(lambda image, key: deform(image, key, config=config))(pixels, keys)


def deform(image: jax.Array, key: jax.Array, *, config: Config) -> jax.Array:
    """One image, float32 [784], sampled bilinearly at moved positions; 0 beyond its border."""
    positions = list(sampling_positions(key, config=config))
    image = jnp.reshape(image, (SIDE, SIDE))
    return jnp.reshape(map_coordinates(image, positions, order=1), N_PIXELS)


def sampling_positions(key: jax.Array, *, config: Config) -> jax.Array:
    """Where the pixels of a deformed image are taken from: rows and columns, [2, 28, 28].

    Rotation, shear, both scales and both shifts are uniform. The elastic shifts are normal, with
    the covariance of noise smoothed by a Gaussian of width `elastic_sigma` (Simard, Steinkraus and
    Platt 2003, who draw uniform noise for each pixel and do not fix the SD of the result).
    """
    affine_key, elastic_key = jax.random.split(key)
    rotation, shear, *scales_and_shift = jax.random.uniform(affine_key, (6,), minval=-1, maxval=1)
    scales, shift = jnp.split(jnp.stack(scales_and_shift), 2)
    angle = jnp.deg2rad(config.rotation) * rotation
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    stretch = jnp.diag(1 + config.scale * scales).at[0, 1].set(config.shear * shear)
    centre = (SIDE - 1) / 2
    grid = np.stack(np.mgrid[:SIDE, :SIDE]).astype(np.float32) - centre
    positions = jnp.einsum("ab,bij->aij", turn @ stretch, grid) + centre
    positions += config.shift * shift[:, None, None]
    if config.elastic:
        bumps = smooth_basis(config.elastic_sigma)
        noise = jax.random.normal(elastic_key, (2, bumps.shape[1], bumps.shape[1]))
        positions += config.elastic * jnp.einsum("ik,akl,jl->aij", bumps, noise, bumps)
    return positions


def smooth_basis(sigma: float) -> np.ndarray:
    """Gaussian bumps [28, knots] along an axis, `sigma` pixels wide and apart, as unit rows.

    So a sum of bumps with standard normal weights is smooth and has an SD of 1 in each pixel, of
    far fewer random numbers than a smoothed noise image takes.
    """
    n_knots = int(np.ceil(SIDE / sigma)) + 2  # one beyond either border
    knots = (np.arange(n_knots) - (n_knots - 1) / 2) * sigma + (SIDE - 1) / 2
    bumps = np.exp(-((np.arange(SIDE)[:, None] - knots) ** 2) / (2 * sigma**2))
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)
