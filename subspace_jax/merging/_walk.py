"""Walks several trees leaf by leaf: one leaf of all experts is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import (
    Full,
    Params,
    PatternError,
    Role,
    StructureError,
    Weight,
    is_weight,
    leaves_with_paths,
    matches,
    nearest,
    resolve_links,
    select_paths,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.merging._change import Change, Factored, form_of, formed
from subspace_jax.merging._site import Site, weights_of
from subspace_jax.weights import LowRank

# What chooses leaves: globs, or a predicate of path and leaf; None for all.
Selector = str | Callable[[str, Any], bool] | Iterable[str]


def sites(
    experts: Sequence[Params],
    base: Params,
    *,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
    least: int = 2,
) -> list[Site]:
    """Returns the leaves that are to be merged, after checking that all trees have them.

    Args:
      experts: trees of arrays, stand-in weights or `Deferred` leaves.
      base: the tree that they were trained from.
      select: which leaves are merged; None for all. Others are not looked at in the experts.
      roles: how plain arrays are read as matrices, by path or glob; two axes are (in, out) without it.
      least: the smallest number of experts.

    Raises:
      StructureError: `experts` is no list or too short, an expert lacks a leaf, has one too many or one of another
        shape, a weight depends on the input, or no chosen leaf holds floating-point numbers.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
    """
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise StructureError(f"experts: expected a list of trees, came a {type(experts).__name__}; write [one, other].")
    if len(experts) < least:
        raise StructureError(
            f"experts: {len(experts)} given, at least {least} expected. A single expert is merged already; to scale or "
            "negate its task vector call task_arithmetic([expert], base, weights=...)."
        )
    base_leaves = leaves_with_paths(base)
    for pattern in roles or {}:
        if not any(pattern == path or matches(pattern, path) for path, _ in base_leaves):
            raise PatternError(
                f"roles: {pattern!r} matches no leaf; nearest are {nearest(pattern, [p for p, _ in base_leaves])}. "
                "Take roles from sj.roles(fn, params, ...) of this tree."
            )
    chosen = {path for path, _ in base_leaves} if select is None else set(select_paths(base, select))
    by_expert = [dict(leaves_with_paths(resolve_links(tree))) for tree in experts]
    known = {path for path, _ in base_leaves}
    for i, leaves in enumerate(by_expert):
        for path in leaves:
            if path not in known and (select is None):
                raise StructureError(
                    f"{path}: expert {i} has this leaf, the base has not; nearest there are {nearest(path, known)}. "
                    "Pass trees of one structure, or select= what all of them have."
                )
    found = []
    for path, leaf in base_leaves:
        if path in chosen and _is_floating(leaf):
            leaves = tuple(_leaf_of(i, tree, path, leaf) for i, tree in enumerate(by_expert))
            found.append(Site(path, leaf, leaves, _role(path, leaf, leaves, roles)))
    if not found:
        raise StructureError("base: none of the leaves chosen holds floating-point numbers; there is nothing to merge.")
    return found


def _leaf_of(expert: int, leaves: Mapping[str, Any], path: str, base: Any) -> Any:
    if path not in leaves:
        raise StructureError(
            f"{path}: expert {expert} lacks this leaf; nearest there are {nearest(path, leaves)}. Pass trees of one "
            "structure, or select= what all of them have."
        )
    if tuple(leaves[path].shape) != tuple(base.shape):
        raise StructureError(
            f"{path}: expert {expert} has shape {tuple(leaves[path].shape)}, the base {tuple(base.shape)}. Pass "
            "experts of one base; heads of different tasks are left out by select=."
        )
    if isinstance(leaves[path], Weight) and not leaves[path].mergeable:
        raise StructureError(
            f"{path}: expert {expert} has a {type(leaves[path]).__name__} that depends on the input, so no array "
            "equals it. Leave this leaf out by select=."
        )
    return leaves[path]


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _role(path: str, base: Any, leaves: Iterable[Any], roles: Mapping[str, Role] | None) -> Role | None:
    of_weights = (leaf.role for leaf in weights_of(leaves) if leaf.role.is_matrix)
    given = next((r for pattern, r in (roles or {}).items() if pattern == path or matches(pattern, path)), None)
    role = given if given is not None else next(of_weights, None)
    if role is None and base.ndim == 2:
        role = Role.dense()
    return role if role is not None and role.is_matrix else None


def merge_leaves(
    experts: Sequence[Params],
    base: Params,
    rule: Callable[[Site], Change],
    *,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
    least: int = 2,
) -> Params:
    """Merges trees leaf by leaf; what every merger is made of.

    Args:
      experts: trees of arrays, stand-in weights or `Deferred` leaves.
      base: the tree that they were trained from.
      rule: returns what the merged tree changes of a leaf.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays are read as matrices, by path or glob.
      least: the smallest number of experts.

    Returns:
      A tree of the base's structure, shapes and dtypes. A change in factors is a low-rank weight on the base's array.
      A formed one is an array, or `Full` where an expert has an adapter, so that the result can be saved as one.

    Raises:
      StructureError: as `sites`, or an adapter stands on another base; the message has the path.
      PatternError: as `sites`.
      NonFiniteError: a change that `rule` looks at holds NaN or infinity.
    """
    found = sites(experts, base, select=select, roles=roles, least=least)
    merged = {site.path: write(site, rule(site)) for site in found}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_weight)
    paths = [path for path, _ in leaves_with_paths(base)]
    return jax.tree.unflatten(treedef, [merged.get(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)])


def write(site: Site, change: Change) -> Any:
    """Returns the base's leaf with a merged change applied.

    Args:
      site: the leaf.
      change: what the merged tree changes of it; None for nothing.

    Returns:
      The base's own leaf for no change; a weight in factors where the change has some and a class of weights holds
      them; else an array, or `Full` where an expert has an adapter.
    """
    if change is None:
        return site.base
    weights = site.weights()
    if isinstance(change, Factored):
        if change.gain is None:
            return low_rank(site.base, change)
        writers = [form.write for leaf in weights if (form := form_of(leaf)) is not None and form.write is not None]
        written = next((made for writer in writers if (made := writer(site.base, change)) is not None), None)
        if written is not None:
            return written
    array = _added(site.base, formed(change, site.base))
    if not isinstance(array, Tracer) and isinstance(site.base, jax.Array) and array.sharding != site.base.sharding:
        array = jax.device_put(array, site.base.sharding)
    if not weights:
        return array
    role = weights[0].role
    return Full(value=array, role=role, dtype=np.dtype(array.dtype), trainable=("value",), method="full")


def low_rank(base: Any, change: Factored) -> LowRank:
    """Returns the low-rank weight that adds a change in factors to the base's leaf.

    Args:
      base: the leaf, an array or a weight that stands for one.
      change: in factors, without a gain.
    """
    array = base if isinstance(base, Weight) else jnp.asarray(base)
    return LowRank(
        base=array,
        a=change.a,
        b=change.b,
        role=change.role,
        dtype=np.dtype(array.dtype),
        trainable=("a", "b"),
        method="lora",
    )


@jax.jit
def _added(base: Any, change: jax.Array) -> jax.Array:
    array = base.materialize(change.dtype) if isinstance(base, Weight) else base.astype(wide_dtype(base.dtype))
    return (array + change).astype(base.dtype)
