"""Placement of matrices for decompositions."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec


def whole_matrices(matrix: jax.Array) -> jax.Array:
    """Returns the array with the last two axes whole on every device, where mesh axes are explicit.

    Decompositions need that there; stacked axes keep their split, so that each device decomposes its own matrices.
    Under automatic axes the compiler gathers by itself, and the array comes back as it is.

    Args:
      matrix: `[*stack, m, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> whole_matrices(jnp.ones((3, 2))).shape
      (3, 2)
    """
    sharding = jax.typeof(matrix).sharding
    if not sharding.mesh.explicit_axes:
        return matrix
    return jax.sharding.reshard(matrix, PartitionSpec(*sharding.spec[:-2], None, None))
