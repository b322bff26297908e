"""Activations of many sequences as one matrix of tokens, for the projections of a layer."""

from __future__ import annotations

import math

import jax


def join_tokens(x: jax.Array) -> jax.Array:
    """Returns `[batch, length, width]` as `[batch * length, width]` on one device, and as it is on several.

    The gradient of a projection's kernel sums over all tokens; over two axes of activations the CPU compiler copies
    them transposed for it, over one it does not. On a mesh, of one device too, batch and length may be split both, and
    joining them would move tokens between devices.

    Args:
      x: `[..., width]`.

    Example:
      >>> import jax.numpy as jnp
      >>> join_tokens(jnp.ones((2, 3, 4))).shape
      (6, 4)
    """
    if jax.device_count() > 1 or not jax.sharding.get_abstract_mesh().empty or x.ndim < 3:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
