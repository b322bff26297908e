"""Vectors and the matrix of the orthonormal discrete cosine transform (DCT-II)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("size", "dtype"), inline=True)
def cosine_vectors(index: Int[Array, " *stack"], size: int, dtype=jnp.float32) -> Float[Array, "*stack size"]:
    r"""Returns rows of the orthonormal DCT-II matrix: \(c_i \cos(\pi (2 j + 1)\, i / 2 N)\) over \(j\).

    Args:
      index: \(i\), integers `[...]` from 0 to `size - 1`.
      size: \(N\), at most half a million.
      dtype: of the result.

    Returns:
      `[..., size]`, each a vector of length 1.

    Example:
      >>> import jax.numpy as jnp
      >>> (2.0 * cosine_vectors(jnp.array([0, 2]), 4)).round(3).tolist()
      [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, 1.0]]
    """
    index = jnp.asarray(index, jnp.int32)[..., None]
    odd = 2 * jnp.arange(size, dtype=jnp.int32) + 1
    # The angle in whole steps of pi / 2N, reduced to one turn in integers: in float32 the product has too few digits.
    # Two parts of the index keep every product within 32 bits.
    period = 4 * size
    steps = ((((index >> 8) * odd) % period << 8) + (index & 255) * odd) % period
    wave = jnp.cos(steps.astype(dtype) * (math.pi / (2 * size)))
    return wave * jnp.where(index == 0, math.sqrt(1.0 / size), math.sqrt(2.0 / size)).astype(dtype)


def cosine_matrix(size: int, dtype=jnp.float32) -> Float[Array, "size size"]:
    r"""Returns the orthonormal DCT-II matrix \(C\): `C @ x` is the transform of `x`, and \(C C^T = I\).

    Args:
      size: number of rows.
      dtype: of the result.

    Example:
      >>> cosine_matrix(2).round(3).tolist()[1][0] > 0
      True
    """
    return cosine_vectors(jnp.arange(size), size, dtype)
