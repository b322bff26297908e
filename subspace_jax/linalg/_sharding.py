"""Placement of matrices for decompositions."""

from __future__ import annotations

import math

import jax
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec


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


def layers_apart(matrix: jax.Array) -> jax.Array:
    """Returns the array with its stack split over the mesh, in a program for a mesh with automatic axes.

    A decomposition needs whole matrices; left alone, the compiler gathers all layers on every device. Everywhere else,
    and where the mesh does not divide the stack, the array comes back as it is.

    Args:
      matrix: `[*stack, m, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> layers_apart(jnp.ones((4, 3, 2))).shape
      (4, 3, 2)
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.empty or not automatic or matrix.ndim == 2 or not isinstance(matrix, Tracer):
        return matrix
    kept: list[str] = []
    for name in mesh.axis_names:
        if matrix.shape[0] % math.prod(mesh.shape[n] for n in (*kept, name)) == 0:
            kept.append(name)
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(tuple(kept))) if kept else matrix
