"""Places matrices over devices as decompositions need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Shaped


def whole_matrices(matrix: Shaped[Array, "*stack m n"]) -> Shaped[Array, "*stack m n"]:
    """Replicates the last two axes of an array over all devices, where mesh axes are explicit.

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


def whole_rows(matrix: Shaped[Array, "*stack m n"]) -> Shaped[Array, "*stack m n"]:
    """Returns the array with its last axis whole on every device, where mesh axes are explicit.

    Args:
      matrix: `[*stack, m, n]`.
    """
    sharding = jax.typeof(matrix).sharding
    if not sharding.mesh.explicit_axes:
        return matrix
    return jax.sharding.reshard(
        matrix, PartitionSpec(*(*sharding.spec, *(None,) * matrix.ndim)[: matrix.ndim - 1], None)
    )


def layers_apart(matrix: Shaped[Array, "*stack m n"]) -> Shaped[Array, "*stack m n"]:
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


def stack_is_whole(stack: Any) -> bool:
    """Returns whether the first axis of an array is known not to be split between devices.

    Then a loop over it sends nothing. Of an array in a program for a mesh with automatic axes that is not known.

    Args:
      stack: an array, or a `jax.ShapeDtypeStruct` with its sharding.

    Example:
      >>> import jax.numpy as jnp
      >>> stack_is_whole(jnp.ones((4, 3, 2)))
      True
    """
    if jax.device_count() == 1:
        return True
    if isinstance(stack, Tracer):
        sharding = jax.typeof(stack).sharding
        if sharding.mesh.empty or not all(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
            return False
    else:
        sharding = getattr(stack, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return not sharding.spec or sharding.spec[0] is None
    return isinstance(sharding, SingleDeviceSharding)


def without_repeats(entries: Sequence[Any]) -> list[Any]:
    """Returns entries of a partition spec in which each mesh axis splits one axis only, the first that names it.

    Args:
      entries: names of mesh axes, tuples of them, or None.

    Example:
      >>> without_repeats(["data", None, "data"])
      ['data', None, None]
    """
    used: set[Any] = set()
    kept: list[Any] = []
    for entry in entries:
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None, PartitionSpec.UNCONSTRAINED}
        kept.append(None if names & used else entry)
        used |= names
    return kept


def by_compiler(
    function: Callable[[jax.Array], jax.Array], array: Shaped[Array, " *shape"]
) -> Shaped[Array, " *shape"]:
    """Runs a function that JAX does not support over explicit mesh axes under automatic sharding.

    Args:
      function: keeps the shape; the result is placed as the array.
      array: of any placement.

    Example:
      >>> import jax.numpy as jnp
      >>> by_compiler(jnp.negative, jnp.ones(2)).tolist()
      [-1.0, -1.0]
    """
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return function(array)
    placed: Any = jax.sharding.auto_axes(function, axes=sharding.mesh.explicit_axes, out_sharding=sharding.spec)
    return placed(array)
