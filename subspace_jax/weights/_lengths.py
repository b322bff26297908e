"""Lengths of a weight's output columns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from subspace_jax.core import Weight


@functools.partial(jax.jit, static_argnames="detach", inline=True)
def column_lengths(weight: Weight, *, detach: bool) -> jax.Array:
    """Returns the length of every output column of a weight, `[*stack, out]`; a column of zeros counts as of length 1.

    Args:
      weight: the weight.
      detach: treat the lengths as constants in the backward pass.
    """
    squared = weight.squared_norms()
    zero = squared == 0
    # The root of a safe value: its derivative at zero is infinite, and would reach the gradient as NaN.
    lengths = jnp.where(zero, 1.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))
    return jax.lax.stop_gradient(lengths) if detach else lengths
