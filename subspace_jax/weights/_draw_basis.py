"""Random matrices that follow from a seed, bit for bit on every backend."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("seed", "stream", "shape", "sparsity", "dtype"))
def draw_basis(seed: int, stream: int, shape: tuple[int, ...], sparsity: float | None, dtype: Any) -> jax.Array:
    r"""Returns a random array of unit standard deviation over all its entries.

    Dense entries are uniform in a symmetric interval. Sparse ones are, before the scaling, \(-1\) or \(1\) with
    probability \(1 / (2 s)\) each, else 0.

    Args:
      seed: a non-negative integer.
      stream: tells the arrays of one seed apart.
      shape: shape of the result.
      sparsity: \(s\), at least 1; None for dense entries.
      dtype: dtype of the result.

    Returns:
      An array of `shape`. The generator is named here and the scaling independent of the order of additions, so that
      the same arguments give the same bits whatever the default generator and the backend are.

    References:
      Achlioptas, Database-friendly random projections, 2003 (the sparse entries).

    Example:
      >>> import jax.numpy as jnp
      >>> bool(abs(jnp.std(draw_basis(0, 0, (64, 64), 3.0, jnp.float32)) - 1) < 0.01)
      True
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
    uniform = jax.random.uniform(key, shape, jnp.float32)
    if sparsity is None:
        values = 2.0 * uniform - 1.0
    else:
        share = 0.5 / sparsity
        values = (uniform > 1.0 - share).astype(jnp.float32) - (uniform < share).astype(jnp.float32)
    return (values * _inverse_deviation(values)).astype(dtype)


def _inverse_deviation(values: jax.Array) -> jax.Array:
    """One over the standard deviation of entries in [-1, 1], to 12 bits.

    A float sum has other last bits on every backend, and the hash of the array with it. So the entries are rounded to
    255 levels, which moves the deviation by less than 1e-4, and summed as integers.
    """
    levels = jnp.round(values * 127.0).astype(jnp.int32)
    squares = jnp.sum((levels * levels).astype(jnp.uint32), axis=-1, dtype=jnp.uint32)
    # In two halves, since the sum of all squares is above what 32 bits hold.
    upper, lower = (jnp.sum(part, dtype=jnp.uint32).astype(jnp.float32) for part in (squares >> 16, squares & 0xFFFF))
    mean = jnp.sum(levels, dtype=jnp.int32).astype(jnp.float32) / values.size
    variance = (upper * 65536.0 + lower) / values.size - mean * mean
    inverse = jnp.where(variance > 0.0, 127.0 / jnp.sqrt(jnp.maximum(variance, 1e-6)), 1.0)
    return jax.lax.reduce_precision(inverse, exponent_bits=8, mantissa_bits=12)
