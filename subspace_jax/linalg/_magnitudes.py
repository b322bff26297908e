"""Order statistics of the magnitudes of matrices, without sorting them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def kth_smallest_magnitude(
    matrix: Float[Array, "*stack m n"], order: Int[Array, "*stack"] | int
) -> Float[Array, "*stack"]:
    """Returns the k-th smallest magnitude among the entries of each matrix, exactly.

    Bisection on the bits of float32, one pass over the matrix for each, where a sort of all entries costs more. Only
    counts are summed, so that a matrix that is split over devices stays where it is.

    Args:
      matrix: `[*stack, m, n]`, in float32 or narrower, without NaN; subnormal entries count as zeros.
      order: counted from 1; 0 gives 0. An int, or an array that broadcasts against the stack; traced values serve.

    Returns:
      `[*stack]` in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> float(kth_smallest_magnitude(jnp.array([[1.0, -2.0], [3.0, -4.0]]), 3))
      3.0
    """
    return jnp.vectorize(_ordered, signature="(m,n),()->()")(matrix, jnp.asarray(order))


def magnitude_quantile(matrix: Float[Array, "*stack m n"], quantile: Any) -> Float[Array, "*stack"]:
    """Returns a quantile of the magnitudes of the entries of each matrix, as `jnp.quantile` interpolates it.

    Args:
      matrix: `[*stack, m, n]`, in float32 or narrower, without NaN.
      quantile: in [0, 1]; a float, or a traced value, which tells the place among more than 2^24 entries to rounding.

    Returns:
      `[*stack]` in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> float(magnitude_quantile(jnp.array([[1.0, -2.0], [3.0, -4.0]]), 0.5))
      2.5
    """
    known = isinstance(quantile, (int, float))
    place = (float(quantile) if known else quantile) * (math.prod(matrix.shape[-2:]) - 1)
    below = math.floor(place) if known else jnp.floor(place)
    share = place - below
    at = kth_smallest_magnitude(matrix, jnp.asarray(below, jnp.int32) + 1)[..., None, None]
    sizes = jnp.abs(matrix).astype(jnp.float32)
    upto = jnp.sum(sizes <= at, axis=(-2, -1), dtype=jnp.int32)
    above = jnp.min(jnp.where(sizes > at, sizes, jnp.inf), axis=(-2, -1), initial=jnp.inf)
    at = at[..., 0, 0]
    above = jnp.where((upto > below + 1) | (share == 0), at, above)
    return at * (1 - share) + above * share


def _ordered(matrix: jax.Array, order: jax.Array) -> jax.Array:
    """The magnitude of an order, counted from 1: non-negative floats are ordered as their bits are.

    The comparison looks at the matrix on both sides of zero: magnitudes would be an array of their own, and a copy.
    """
    matrix = matrix.astype(jnp.float32)

    def narrow(step: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.ones((), jnp.int32) << (30 - step).astype(jnp.int32))
        limit = lax.bitcast_convert_type(tried, jnp.float32)
        below = jnp.sum((matrix < limit) & (matrix > -limit), dtype=jnp.int32)
        return jnp.where(below < order, tried, found)

    found = lax.fori_loop(0, 31, narrow, jnp.zeros((), jnp.int32))
    normal = found > jnp.iinfo(jnp.int32).max >> 8  # a CPU compares smaller ones as zeros
    return lax.bitcast_convert_type(jnp.where(normal, found, 0), jnp.float32)
