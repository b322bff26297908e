"""Which features of a backbone, and which turned copies of the few normal images."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import check_choice, check_int, check_number

Mix = Literal["mean", "concat", "grouped"]


def middle_layers(num_blocks: int) -> tuple[int, ...]:
    """Returns the hidden states that are averaged: of 40 blocks those after blocks 23 to 29 counted from one.

    Index 0 is the embedding, index i the output of the i-th block. Other depths take the same relative range.

    Args:
      num_blocks: of the backbone.

    Example:
      >>> middle_layers(40) == tuple(range(23, 30)), middle_layers(12)
      (True, (7, 8, 9))
    """
    blocks = check_int("middle_layers: num_blocks", num_blocks)
    first, last = (max(1, round(end / 40 * blocks)) for end in (23, 29))
    return tuple(range(first, last + 1))


def mix_layers(states: jax.Array, mix: Mix = "mean", groups: int = 2) -> jax.Array:
    """Combines each patch's hidden states of several layers, without the final norm, into one feature vector.

    Args:
      states: `[layers, ..., width]`, of the chosen layers.
      mix: "mean" over layers, as published; "concat" of them; "grouped": means of consecutive groups, concatenated.
      groups: of "grouped".

    Returns:
      `[..., width]`, `[..., layers * width]` or `[..., groups * width]`, in at least float32.

    Raises:
      ValueError: an unknown way.
      RankError: more groups than layers.

    Example:
      >>> import jax.numpy as jnp
      >>> mix_layers(jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))]), "concat").shape
      (2, 6)
    """
    check_choice("mix_layers: mix", mix, ("mean", "concat", "grouped"))
    states = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    if mix == "mean":
        return jnp.mean(states, axis=0)
    count = states.shape[0] if mix == "concat" else check_int("mix_layers: groups", groups, 1, states.shape[0])
    return jnp.concatenate([jnp.mean(part, axis=0) for part in jnp.array_split(states, count)], axis=-1)


def rotation_angles(key: jax.Array, count: int = 30, most: float = 345.0) -> jax.Array:
    """Draws the angles of the turned copies, in degrees, uniform between 0 and `most`.

    Draw them once: every pass over the data must see the same copies.

    Args:
      key: a random key; the same key draws the same angles.
      count: number of copies; 0 for objects whose orientation matters.
      most: largest angle.

    Example:
      >>> import jax
      >>> rotation_angles(jax.random.key(0), 3).shape
      (3,)
    """
    count = check_int("rotation_angles: count", count, 0)
    check_number("rotation_angles: most", most, least=0.0)
    return jax.random.uniform(key, (count,), maxval=most)


@jax.jit
def rotate(image: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns an image about its center, counterclockwise; corners that come from outside are black.

    Args:
      image: `[height, width, channels]`.
      angles: `[n]`, degrees.

    Returns:
      `[n, height, width, channels]`, bilinear, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> rotate(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]), jnp.array([90.0]))[0, ..., 0].round(5)
      Array([[2., 4.],
             [1., 3.]], dtype=float32)
    """
    image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    height, width, _ = image.shape
    center = jnp.array([(height - 1) / 2, (width - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(height) - center[0], jnp.arange(width) - center[1], indexing="ij")

    def one(angle: jax.Array) -> jax.Array:
        cosine, sine = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
        y = cosine * rows + sine * columns + center[0]
        x = -sine * rows + cosine * columns + center[1]
        sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=1, cval=0.0)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.lax.map(one, angles)
