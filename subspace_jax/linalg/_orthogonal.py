"""Orthogonal matrices from skew-symmetric ones."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


def skew(entries: jax.Array, size: int) -> jax.Array:
    """Returns skew-symmetric matrices whose strict upper triangles, row by row, are `entries`.

    Args:
      entries: `[..., size * (size - 1) / 2]`.
      size: number of rows.

    Returns:
      `[..., size, size]`.

    Example:
      >>> import jax.numpy as jnp
      >>> skew(jnp.array([1.0, 2.0, 3.0]), 3).tolist()
      [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    rows, columns = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype).at[..., rows, columns].set(entries)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(matrix: jax.Array) -> jax.Array:
    r"""Returns \((I + Q)(I - Q)^{-1}\): a rotation for skew-symmetric \(Q\), by a solve in float32.

    Args:
      matrix: \(Q\), `[..., n, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> cayley(jnp.array([[0.0, 1.0], [-1.0, 0.0]])).round(5).tolist()
      [[0.0, 1.0], [-1.0, 0.0]]
    """
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)
    # (I + Q) and (I - Q)^-1 commute, so that a left solve serves.
    return jnp.linalg.solve(eye - wide, eye + wide)


def cayley_neumann(matrix: jax.Array, terms: int) -> jax.Array:
    r"""Returns the Cayley transform with its inverse cut to a series: \(I + 2Q + \dots + 2Q^{t-2} + Q^{t-1}\).

    It equals \(\mathrm{Cayley}(Q)\,(I - Q^{t-1})\), so it is orthogonal up to \(O(\|Q\|^{t-1})\) only.

    Args:
      matrix: \(Q\), `[..., n, n]`.
      terms: \(t\), at least 2.

    Example:
      >>> import jax.numpy as jnp
      >>> cayley_neumann(jnp.zeros((2, 2)), 5).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    if terms < 2:
        raise ValueError(f"cayley_neumann: terms={terms}; the series has at least 2.")
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    eye = jnp.broadcast_to(jnp.eye(wide.shape[-1], dtype=wide.dtype), wide.shape)
    total, power = eye, eye
    for i in range(1, terms):
        power = jnp.matmul(power, wide, precision=lax.Precision.HIGHEST)
        total = total + (power if i == terms - 1 else 2 * power)
    return total


def skew_size(size: int) -> int:
    """Returns the number of free entries of a skew-symmetric matrix.

    >>> skew_size(4)
    6
    """
    return math.comb(size, 2)
