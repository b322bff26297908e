"""Fuses adapters made of slices, exchanges them in a merged model, and serves many of them in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Params,
    PyTree,
    StructureError,
    is_weight,
    leaves_with_paths,
    map_with_paths,
    with_adapters,
)
from subspace_jax.methods.sparse.s2ft._weight import DenseSlice


def fuse_slices(*adapted: Params) -> Params:
    """Returns one adapter whose change is the sum of those of several adapters of one base.

    Slots are concatenated, so selections that do not overlap keep their values exactly, and rows that two
    adapters both change get both changes.

    Args:
      *adapted: trees of one base whose stand-ins are `DenseSlice`; a leaf may be adapted in some of them only.

    Returns:
      A tree whose weights train the change ("delta") of all their slots.

    Raises:
      StructureError: a weight is not a `DenseSlice`, or one tree has rows where another has columns.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> methods, key = [sj.s2ft(0.5, seed=seed) for seed in (0, 1)], jax.random.key(0)
      >>> trees = [sj.adapt({"w": jnp.ones((4, 3))}, {"w": method}, key=key) for method in methods]
      >>> fuse_slices(*trees)["w"].slots
      4
    """

    def one(path: str, *leaves: Any) -> Any:
        slices = [_checked(path, leaf) for leaf in leaves if is_weight(leaf)]
        if not slices:
            return leaves[0]
        first = slices[0]
        if len({weight.rows is None for weight in slices}) > 1:
            raise StructureError(f"{path}: rows learn in one tree and columns in another; merge() one of them first.")
        change = [weight.change() for weight in slices]
        rows = first.rows is not None
        return dataclasses.replace(
            first,
            rows=jnp.concatenate(change, -2) if rows else None,
            columns=None if rows else jnp.concatenate(change, -1),
            selected=jnp.concatenate([weight.positions() for weight in slices], -1),
            start=0,
            parameterization="delta",
        )

    return map_with_paths(one, *adapted)


def switch_slices(params: Params, old: Params, new: Params) -> Params:
    """Replaces the adapter that is merged into a model by another one.

    Args:
      params: tree of arrays with `old` merged into it.
      old: the adapter to take out, a tree with `DenseSlice` weights; None for none.
      new: the adapter to put in; None for none.

    Returns:
      A tree of arrays. Each array is added up in float32, so the base comes back up to rounding.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> old = sj.adapt(params, {"w": sj.s2ft(0.5)}, key=jax.random.key(0))
      >>> bool(jnp.all(switch_slices(sj.merge(old), old, None)["w"] == params["w"]))
      True
    """

    def apply(tree: PyTree, adapter: Params, sign: float) -> Params:
        def one(path: str, array: Any, weight: Any) -> Any:
            if not is_weight(weight):
                return array
            found = _checked(path, weight)
            field = "rows" if found.rows is not None else "columns"
            changed = {field: sign * found.change(), "base": array, "parameterization": "delta"}
            return dataclasses.replace(found, **changed).materialize(array.dtype)

        return tree if adapter is None else map_with_paths(one, tree, adapter)

    return apply(apply(params, old, -1.0), new, 1.0)


def serve_slices(fn: Callable[..., Any], adapted: Sequence[Params], tasks: jax.Array, *inputs: jax.Array) -> Any:
    r"""Runs a batch in which every example has an adapter of its own.

    One product with the base for the whole batch, and for each example \(x_{sel}\,\Delta\) with its own selection and
    change out of the bank of all adapters.

    Args:
      fn: `fn(params, *inputs)` for one example.
      adapted: adapters of one base, with equal numbers of slots (pad with the number of rows or columns).
      tasks: which of them each example has, `[batch]`.
      *inputs: arrays with a leading axis `batch`.

    Returns:
      What `fn` returns, with a leading axis `batch`.

    Raises:
      StructureError: the adapters are not of one structure.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> methods, key = [sj.s2ft(0.5, seed=seed) for seed in (0, 1)], jax.random.key(0)
      >>> trees = [sj.adapt({"w": jnp.ones((4, 3))}, {"w": method}, key=key) for method in methods]
      >>> serve_slices(lambda p, x: x @ p["w"], trees, jnp.array([0, 1, 1]), jnp.ones((3, 4))).shape
      (3, 3)
    """
    own = [_parts_by_path(tree) for tree in adapted]
    if any(jax.tree.map(jnp.shape, parts) != jax.tree.map(jnp.shape, own[0]) for parts in own):
        raise StructureError(
            "serve_slices: the adapters differ in what they adapt or in the number of slots; give all of them the "
            "same rules, with equal counts of rows or columns."
        )
    bank = jax.tree.map(lambda *values: jnp.stack(values), *own)

    def of_one(task: jax.Array, *inputs: jax.Array) -> Any:
        chosen = jax.tree.map(lambda values: values[task], bank)

        def one(path: str, leaf: Any) -> Any:
            return dataclasses.replace(leaf, **chosen[path], parameterization="delta") if path in chosen else leaf

        return with_adapters(fn, custom_rules="inline")(map_with_paths(one, adapted[0]), *inputs)

    return jax.vmap(of_one)(tasks, *inputs)


def _parts_by_path(tree: PyTree) -> dict[str, dict[str, jax.Array]]:
    """What is an adapter's own: the change and where it goes."""
    found = {path: _checked(path, leaf) for path, leaf in leaves_with_paths(tree) if is_weight(leaf)}
    return {
        path: {"rows" if weight.rows is not None else "columns": weight.change(), "selected": weight.positions()}
        for path, weight in found.items()
    }


def _checked(path: str, weight: Any) -> DenseSlice:
    if not isinstance(weight, DenseSlice):
        raise StructureError(f"{path}: is a {type(weight).__name__}; expected a DenseSlice, as s2ft() makes.")
    return weight
