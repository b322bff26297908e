"""Makes a mesh of all devices, and places batches on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from subspace_jax.core import Batch, path_string


def make_mesh(axes: Mapping[str, int], *, explicit: bool = False, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of all devices with named axes, laid out by `jax.make_mesh`.

    Args:
      axes: size of every axis by name, the slowest links first; one of them may be -1, which takes what is left.
      explicit: axes of type Explicit, where the types of arrays say how they are split; otherwise the compiler
        decides (Auto).
      devices: those of the mesh; all of all processes if None.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.

    Example:
      >>> import jax
      >>> mesh = make_mesh({"data": -1, "model": 1})
      >>> mesh.axis_names, mesh.size == jax.device_count()
      (('data', 'model'), True)
    """
    found = jax.devices() if devices is None else list(devices)
    sizes = _sizes(axes, len(found))
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=found)


def _sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes with the one that is -1 filled in."""
    sizes = {name: size for name, size in axes.items()}
    wrong = [name for name, size in sizes.items() if isinstance(size, bool) or not isinstance(size, int)]
    wrong += [name for name in sizes if name not in wrong and sizes[name] < 1 and sizes[name] != -1]
    free = [name for name, size in sizes.items() if size == -1]
    if not sizes or wrong or len(free) > 1:
        raise ValueError(
            f"make_mesh: axes={sizes}; expected a positive int for every axis, and -1 for at most one of them."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and count % known == 0:
        sizes[free[0]] = count // known
    elif free or known != count:
        raise ValueError(
            f"make_mesh: axes={sizes} are {known} devices{' times a whole number' if free else ''}, and there are "
            f"{count}. Let one axis be -1 to take what is left, or choose sizes that multiply to {count}."
        )
    return sizes


def shard_batch(batch: Batch, mesh: Mesh, axis: str | Sequence[str] = "data") -> Batch:
    """Places a batch on a mesh, its leading axis split over one or more mesh axes.

    Every process gives its own rows, and the batch is made of all of them in the order of the devices; on one process
    they are the whole batch. Processes that hold the same part of the mesh axes (those that differ only along others)
    give the same rows. Arrays without axes are whole everywhere.

    Args:
      batch: a tree of arrays `[rows, ...]`; the same number of rows in every process.
      mesh: from `make_mesh`.
      axis: the mesh axis or axes that the rows are split over.

    Returns:
      The tree with arrays `[rows of all processes, ...]`.

    Raises:
      ValueError: the mesh has no such axis, or the rows cannot be dealt out evenly.

    Example:
      >>> import numpy as np
      >>> mesh = make_mesh({"data": -1})
      >>> placed = shard_batch({"x": np.ones((8 * mesh.size, 3))}, mesh)
      >>> placed["x"].sharding.spec
      P('data',)
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(f"shard_batch: axis={axis!r}: the mesh has no {unknown[0]!r}, only {mesh.axis_names}.")
    rows = NamedSharding(mesh, PartitionSpec(names[0] if len(names) == 1 else names))
    parts = math.prod(mesh.shape[name] for name in names)
    # How many of the parts this process holds; the others hold the others.
    held = len({str(index) for index in rows.addressable_devices_indices_map((parts,)).values()})

    def put(path: Any, value: Any) -> jax.Array:
        local = np.asarray(value)
        if not local.ndim:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), local, ())
        if local.shape[0] % held:
            raise ValueError(
                f"{path_string(path) or 'batch'}: shard_batch: {local.shape[0]} rows in this process cannot be dealt "
                f"out to the {held} parts of mesh axes {names} that it holds; give a multiple of {held}."
            )
        shape = (local.shape[0] // held * parts, *local.shape[1:])
        return jax.make_array_from_process_local_data(rows, local, shape)

    return jax.tree_util.tree_map_with_path(put, batch)
