"""Shardings for the arrays of adapters and optimizer states, from those of the weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from subspace_jax.core import Params, PyTree, StructureError, Weight, is_weight, map_with_paths, path_string


def shardings(adapted: Params, base: Params, mesh: Mesh | None = None) -> PyTree:
    """Returns a sharding for every array of an adapted tree, from those of the weights that it stands for.

    The parts of a stand-in are split as the axes of its weight that they share: `a` as the input axis, `b` as the
    output axis, stacked layers as the stack; the rank's axis is whole on every device. So no step with adapters moves
    a frozen weight. Axes as long as the weight's own, the rank of `SplitSVD` and the entries of `SparseDelta`, are
    split over the weight's other mesh axes, where they divide: a device holds as small a share of such a part as of
    the weight. Give it to `jax.device_put`, or as `out_shardings` of a jitted start or step.

    Args:
      adapted: the tree from `adapt`, or one part of it from `partition`; arrays may be abstract.
      base: by the same paths the arrays of the unadapted model, placed on a mesh, or their `NamedSharding`s, or with
        `mesh` their `PartitionSpec`s.
      mesh: of the partition specs.

    Returns:
      A tree like `adapted` with a `NamedSharding` in place of every array.

    Raises:
      StructureError: a path of `adapted` has no sharding in `base`, or a spec has no mesh.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> adapted = sj.adapt({"w": jnp.ones((8, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> found = sj.shardings(adapted, {"w": P("data", "model")}, mesh)
      >>> found["w"].a.spec, found["w"].b.spec
      (P('data', None), P(None, 'model'))
    """
    given = dict(_base_leaves(base))

    def one(path: str, value: Any) -> Any:
        if not jax.tree.leaves(value):
            return value  # a hole of a partition
        if path not in given:
            raise StructureError(
                f"{path}: shardings: base has nothing at this path. Give the tree that adapt() was given, placed on a "
                "mesh, or the shardings of its arrays."
            )
        sharding = _named(path, given[path], mesh)
        if not is_weight(value):
            return sharding
        specs = _spread(value, value.partition_specs(sharding.spec), sharding)
        return jax.tree.map(
            lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda v: isinstance(v, PartitionSpec)
        )

    return map_with_paths(one, adapted)


def _spread(weight: Weight, specs: Weight, whole: NamedSharding) -> Weight:
    """The specs with the mesh axes of the whole array that a part leaves over on that part's long axis."""

    def one(name: str, spec: Any) -> Any:
        part = getattr(weight, name)
        if is_weight(part):
            return _spread(part, spec, whole)
        if name not in weight.spread:
            return spec
        entries = [*spec, *(None,) * (part.ndim - len(spec))]
        axis = weight.spread[name] % part.ndim
        entries[axis] = _left_over(whole, entries, part.shape[axis])
        return PartitionSpec(*entries)

    return specs.map_fields(one)


def _left_over(whole: NamedSharding, entries: list[Any], size: int) -> Any:
    """The mesh axes of an array's spec that are not in `entries`, as many as divide the size."""
    used = {name for entry in entries for name in _names(entry)}
    kept: list[str] = []
    for name in (n for entry in whole.spec for n in _names(entry) if n not in used):
        if size % math.prod(whole.mesh.shape[n] for n in (*kept, name)) == 0:
            kept.append(name)
    return tuple(kept) if len(kept) > 1 else (kept or [None])[0]


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _base_leaves(base: Params) -> list[tuple[str, Any]]:
    def is_leaf(value: Any) -> bool:
        return is_weight(value) or isinstance(value, (PartitionSpec, NamedSharding))

    leaves, _ = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_leaf)
    return [(path_string(path), value) for path, value in leaves]


def _named(path: str, value: Any, mesh: Mesh | None) -> NamedSharding:
    """The sharding of one array of the base, however it was given."""
    if isinstance(value, PartitionSpec) and mesh is not None:
        return NamedSharding(mesh, value)
    sharding = value if isinstance(value, NamedSharding) else getattr(value, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return sharding
    what = value if isinstance(value, PartitionSpec) else type(value).__name__
    raise StructureError(
        f"{path}: shardings: base has {what} here, which is on no mesh. Give arrays placed with a NamedSharding, "
        "NamedShardings, or PartitionSpecs and mesh=."
    )


def state_shardings(optimizer: optax.GradientTransformation, params: Params, placed: PyTree) -> PyTree:
    """Returns a sharding for every array of an optimizer's state: moments, bases, coordinates, indices.

    `init` is traced abstractly with explicit mesh axes, so that every array of the state says how it is split: moments
    as their parameters, a basis as the side that it lies in. Coordinates in a subspace and its basis lose one side of
    the parameter; on meshes of automatic axes, the mesh axes of that side split the subspace's own axis where they
    divide it, so that a device holds as small a share of them as of the parameter; not where the state has indices, by
    which coordinates move along that axis. Nothing is allocated; no state is gathered on one device.

    Args:
      optimizer: any optax transformation.
      params: what `init` takes; arrays may be abstract.
      placed: `NamedSharding`s of `params`, from `shardings`.

    Returns:
      A tree like the state, for `jax.jit(optimizer.init, out_shardings=...)`.

    Raises:
      StructureError: there is no sharding in `placed`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> params = {"w": jnp.ones((8, 4))}
      >>> placed = sj.shardings(params, {"w": P("data", "model")}, mesh)
      >>> sj.state_shardings(optax.adam(1e-3), params, placed)[0].mu["w"].spec
      P('data', 'model')
    """
    found = [s for s in jax.tree.leaves(placed) if isinstance(s, NamedSharding)]
    if not found:
        raise StructureError("state_shardings: placed holds no NamedSharding; see shardings().")
    mesh = found[0].mesh
    explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def abstract(value: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(explicit, sharding.spec))

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(optimizer.init, jax.tree.map(abstract, params, placed))

    owners = _by_suffix(params, placed) if AxisType.Explicit not in mesh.axis_types else {}
    chosen = {_owner(owners, p) for p, v in jax.tree_util.tree_leaves_with_path(state) if v.ndim and _counts(v)}

    def named(path: Any, value: Any) -> NamedSharding:
        spec = value.sharding.spec if isinstance(value.sharding, NamedSharding) else PartitionSpec()
        owner = _owner(owners, path)
        if owner is not None and owner not in chosen and tuple(value.shape) != owner[0]:
            spec = _filled(spec, value.shape, *owner)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(named, state)


def _counts(value: Any) -> bool:
    """Tells whether an array of the state holds indices: what is chosen by them moves along the subspace's axis."""
    return jnp.issubdtype(value.dtype, jnp.integer)


# Shape and placement of a parameter, by every end of its path; None where several parameters have this end.
_Owners = dict[tuple[Any, ...], tuple[tuple[int, ...], NamedSharding] | None]


def _by_suffix(params: Params, placed: PyTree) -> _Owners:
    found: _Owners = {}
    placements = dict(jax.tree_util.tree_leaves_with_path(placed))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        one = tuple(leaf.shape), placements[path]
        for start in range(len(path)):
            found[path[start:]] = one if found.get(path[start:], one) == one else None
    return found


def _owner(owners: _Owners, path: tuple[Any, ...]) -> tuple[tuple[int, ...], NamedSharding] | None:
    """The parameter that an array of the state belongs to: the one whose path's end is the longest part of its path."""
    for size in range(len(path), 0, -1):
        for start in range(len(path) - size + 1):
            if path[start : start + size] in owners:
                return owners[path[start : start + size]]
    return None


def _filled(
    spec: PartitionSpec, shape: tuple[int, ...], of_owner: tuple[int, ...], owner: NamedSharding
) -> PartitionSpec:
    """The spec with the mesh axes of the parameter that it leaves over, on whole axes behind stacked layers."""
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    whole = [*owner.spec, *(None,) * (len(of_owner) - len(owner.spec))]
    first = 0
    while first < min(len(shape), len(whole)) and shape[first] == of_owner[first] and whole[first] is None:
        first += 1
    for axis in range(first, len(shape)):
        if entries[axis] is None:
            entries[axis] = _left_over(owner, entries, shape[axis])
    return PartitionSpec(*entries)
