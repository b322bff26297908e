"""Removes what a projection leaves of an array inside the removed subspace: rounding, which Adam would amplify."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# What a projection leaves of a gradient inside the removed subspace is rounding of about this size.
ROUNDING = 32 * float(jnp.finfo(jnp.float32).eps)


def without_rounding(
    projected: jax.Array, whole: jax.Array, tolerance: float = ROUNDING, *, renorm: bool = False
) -> jax.Array:
    """Sets projected matrices to zero where only rounding error of the original is left.

    Adam would give rounding full steps, in directions that mean nothing.

    Args:
      projected: `[*stack, m, n]`, a projection of `whole`, or coordinates of it with other sizes.
      whole: `[*stack, m, n]`.
      tolerance: the share of the whole's norm up to which something is rounding.
      renorm: whether what is left gets the norm of the whole.

    Example:
      >>> import jax.numpy as jnp
      >>> without_rounding(jnp.array([[1e-8, 0.0]]), jnp.array([[0.0, 1.0]])).tolist()
      [[0.0, 0.0]]
    """
    largest = jnp.max(jnp.abs(whole), (-2, -1), keepdims=True, initial=0.0).astype(projected.dtype)
    unit = jnp.where(largest == 0, 1.0, largest)  # squares of very small or large entries leave the range of floats
    left, total = (
        jnp.sqrt(jnp.sum(jnp.square(v.astype(projected.dtype) / unit), (-2, -1), keepdims=True))
        for v in (projected, whole)
    )
    empty = left <= tolerance * total
    factor = total / jnp.where(left == 0, 1.0, left) if renorm else 1.0
    return jnp.where(empty, 0.0, factor * projected)
