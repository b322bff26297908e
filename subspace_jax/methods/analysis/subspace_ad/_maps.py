"""From patch scores to pixel maps and one number an image."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_choice, check_int, check_number

Aggregate = Literal["top", "max", "mean", "p99", "top5"]
_AGGREGATES = ("top", "max", "mean", "p99", "top5")


def anomaly_maps(scores: jax.Array, size: tuple[int, int], *, sigma: float = 4.0, kernel: int = 3) -> jax.Array:
    """Returns pixel maps: bilinear resize of patch scores (half-pixel centers), then a Gaussian blur of odd width.

    Sigma 4 in a 3 x 3 kernel is nearly a box filter; that is what the publication uses.

    Args:
      scores: `[..., rows, columns]` of patches.
      size: height and width in pixels.
      sigma: of the blur, in pixels.
      kernel: side of its window, odd; 1 for no blur. The border is mirrored without repeating it.

    Returns:
      `[..., height, width]`.

    Raises:
      RankError: `kernel` or a side of `size` is no positive integer.
      ValueError: an even kernel, or one that does not fit; sigma is not positive, or the scores are no maps.

    Example:
      >>> import jax.numpy as jnp
      >>> anomaly_maps(jnp.full((2, 4, 4), 3.0), (8, 8)).shape
      (2, 8, 8)
    """
    check_number("anomaly_maps: sigma", sigma, above=0.0)
    kernel = check_int("anomaly_maps: kernel", kernel)
    height, width = (check_int("anomaly_maps: size", side) for side in size)
    scores = jnp.asarray(scores)
    if scores.ndim < 2:
        raise ValueError(f"anomaly_maps: scores {scores.shape}; expected [..., rows, columns] of patches.")
    if kernel % 2 == 0 or kernel // 2 >= min(height, width):
        raise ValueError(f"anomaly_maps: kernel={kernel}; expected an odd width that fits into {height} x {width}.")
    return _maps(scores, (height, width), float(sigma), kernel)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _maps(scores: jax.Array, size: tuple[int, int], sigma: float, kernel: int) -> jax.Array:
    half = kernel // 2
    maps = jax.image.resize(scores, (*scores.shape[:-2], *size), "bilinear", antialias=False)
    weights = np.exp(-0.5 * np.square(np.arange(-half, half + 1) / sigma))
    weights = weights / weights.sum()
    for axis in (-2, -1):
        length = maps.shape[axis]
        border = [(0, 0)] * maps.ndim
        border[axis] = (half, half)
        padded = jnp.pad(maps, border, mode="reflect")
        parts = [
            float(w) * jax.lax.slice_in_dim(padded, i, i + length, axis=axis % maps.ndim) for i, w in enumerate(weights)
        ]
        maps = functools.reduce(jnp.add, parts)
    return maps


def image_scores(maps: jax.Array, how: Aggregate = "top", share: float = 0.01) -> jax.Array:
    r"""Returns one score an image: the mean of the highest 1 % of its map, \(\max(1, \lfloor 0.01 n \rfloor)\) pixels.

    Args:
      maps: `[..., height, width]`.
      how: "top" as published, or "max", "mean", "p99" (the 99th percentile), "top5" (mean of five pixels).
      share: of pixels that "top" averages.

    Returns:
      `[...]`.

    Raises:
      ValueError: an unknown aggregate, or a share outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> image_scores(jnp.arange(100.0).reshape(10, 10), share=0.02)
      Array(98.5, dtype=float32)
    """
    check_choice("image_scores: how", how, _AGGREGATES)
    check_number("image_scores: share", share, above=0.0, most=1.0)
    maps = jnp.asarray(maps)
    pixels = maps.shape[-2] * maps.shape[-1]
    # 1e-9: 0.01 x 5800 is 57.99999999999999 in binary.
    count = {"top": max(1, int(share * pixels + 1e-9)), "max": 1, "top5": min(5, pixels)}.get(how, 0)
    return _aggregate(maps.reshape(*maps.shape[:-2], pixels), how, count)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _aggregate(pixels: jax.Array, how: str, count: int) -> jax.Array:
    if how == "mean":
        return jnp.mean(pixels, axis=-1)
    if how == "p99":
        return jnp.percentile(pixels, 99, axis=-1)
    return jnp.mean(jax.lax.top_k(pixels, count)[0], axis=-1)
