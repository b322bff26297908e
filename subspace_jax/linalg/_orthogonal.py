"""Orthogonal matrices from skew-symmetric ones."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames="size", inline=True)
def skew(entries: Float[Array, "*stack free"], size: int) -> Float[Array, "*stack size size"]:
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
    if size < 2:
        return jnp.zeros((*entries.shape[:-1], size, size), entries.dtype)
    # Read where each entry stands: a sixth of the time of writing a triangle and subtracting its transpose.
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    low, high = jnp.minimum(row, column), jnp.maximum(row, column)
    place = jnp.maximum(low * (2 * size - low - 1) // 2 + high - low - 1, 0)
    found = entries.at[..., place].get(mode="promise_in_bounds")
    return jnp.where(row < column, found, jnp.where(row > column, -found, 0))


@jax.custom_jvp
def cayley(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    r"""Returns the Cayley transform \((I + Q)(I - Q)^{-1}\), a rotation for skew-symmetric \(Q\).

    Its derivative is \(\frac{1}{2} (I + R)\,dQ\,(I + R)\), so that no step solves anything backwards.

    Args:
      matrix: \(Q\), skew-symmetric, `[..., n, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> cayley(jnp.array([[0.0, 1.0], [-1.0, 0.0]])).round(5).tolist()
      [[0.0, 1.0], [-1.0, 0.0]]
    """
    return _cayley(matrix)


@functools.partial(jax.jit, inline=True)
def _cayley(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)
    # (I + Q) = 2 I - (I - Q), so an inverse is all that is needed.
    return 2.0 * lax.platform_dependent(eye - wide, cpu=_inverse_by_sweeps, default=jnp.linalg.inv) - eye


@cayley.defjvp
def _cayley_jvp(
    primals: tuple[Float[Array, "*stack n n"]], tangents: tuple[Float[Array, "*stack n n"]]
) -> tuple[Float[Array, "*stack n n"], Float[Array, "*stack n n"]]:
    rotation = cayley(*primals)
    half = rotation + jnp.eye(rotation.shape[-1], dtype=rotation.dtype)
    change = tangents[0].astype(rotation.dtype)
    precision = lax.Precision.HIGHEST
    return rotation, 0.5 * jnp.matmul(jnp.matmul(half, change, precision=precision), half, precision=precision)


def _inverse_by_sweeps(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """The inverse of matrices with a positive definite symmetric part, which need no pivoting.

    On CPU many decompositions beside products in one program can deadlock (jax 0.10, two cores);
    this is made of elementwise operations alone.
    """
    size = matrix.shape[-1]
    places = jnp.arange(size)

    def sweep(k: Int[Array, ""], current: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
        row = lax.dynamic_index_in_dim(current, k, axis=-2)
        column = lax.dynamic_index_in_dim(current, k, axis=-1)
        pivot = lax.dynamic_index_in_dim(row, k, axis=-1)
        in_row, in_column = (places == k)[:, None], (places == k)[None, :]
        inside = jnp.where(in_row, row / pivot, current - column * (row / pivot))
        return jnp.where(in_column, jnp.where(in_row, 1.0 / pivot, -column / pivot), inside)

    return lax.fori_loop(0, size, sweep, matrix)


def cayley_neumann(matrix: Float[Array, "*stack n n"], terms: int) -> Float[Array, "*stack n n"]:
    r"""Returns the Cayley transform with its inverse cut to a series: \(I + 2Q + \dots + 2Q^{t-2} + Q^{t-1}\).

    It equals \(\mathrm{Cayley}(Q)\,(I - Q^{t-1})\), so it is orthogonal up to \(O(\|Q\|^{t-1})\) only.

    Args:
      matrix: \(Q\), `[..., n, n]`.
      terms: \(t\), at least 2.

    Raises:
      ValueError: `terms` is below 2.

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
