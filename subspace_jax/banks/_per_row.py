"""Runs a model on a batch whose rows use different adapters of a bank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.banks._modules import BANKS
from subspace_jax.core import (
    MaterializeRules,
    PyTree,
    StructureError,
    is_tracer,
    is_weight,
    map_with_paths,
    with_adapters,
)


def per_row(
    fn: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    on_materialize: MaterializeRules = "error",
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    r"""Makes a function of parameters and a batch take a bank of adapters and one slot for each row.

    The function runs on every row as a batch of one, by `jax.vmap` with the base held fixed: its products keep the rows
    as one matrix and the base is never copied; only the factors of each row's adapter are gathered. A row that names
    slot 0 gets what the plain parameters give, to the last bit in one program, whatever the other rows use.

    What follows from rows being batches of their own: statistics over the batch (BatchNorm in training) and capacities
    of experts are those of one row; both branches of a `cond` run where rows differ in them; a loop runs as long as its
    longest row; a random key among the arguments serves all rows alike, unless it is folded with something of the row.

    Args:
      fn: `fn(params, *args)`, such as `lambda p, x: model.apply({"params": p}, x)`; not yet given to `with_adapters`.
      in_axes: where each argument has its rows, as in `jax.vmap`: an int, or a tuple with one entry for each argument,
        an int, None (no rows: a key, a position) or a tree of these. A cache that is scanned over layers has rows
        on axis 1, and its index none. The function sees that axis, of size one.
      out_axes: where the results have their rows, likewise.
      on_materialize: as in `with_adapters`.
      spmd_axis_name: mesh axes over which the rows are split, as in `jax.vmap`: what the model says of layouts
        (`jax.lax.with_sharding_constraint`) is then said of one row, without these axes, and rows stay split.

    Returns:
      A function `(bank, rows, *args)`; `rows` is an integer array `[batch]` of slots. It may be jitted and
      differentiated; another assignment of rows, or another content of the bank, compiles nothing.

    Raises:
      StructureError: when called, if the tree holds no bank.
      ValueError: when called, if `rows` are not as many as the batch, or name a slot that is not there.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> adapted = sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> adapted["w"] = dataclasses.replace(adapted["w"], a=jnp.ones((4, 2)), b=jnp.ones((2, 3)))
      >>> run = sj.per_row(lambda p, x: x @ p["w"])
      >>> run(sj.bank(params, [adapted]), jnp.array([0, 1]), jnp.ones((2, 4)))
      Array([[ 4.,  4.,  4.],
             [12., 12., 12.]], dtype=float32)
    """
    inner = with_adapters(fn, on_materialize=on_materialize)

    @functools.wraps(fn)
    def wrapped(bank: PyTree, rows: jax.Array, *args: Any) -> Any:
        rows = jnp.asarray(rows)
        _check_rows(bank, rows)
        places = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        if len(places) != len(args):
            raise ValueError(f"per_row: in_axes has {len(places)} entries for {len(args)} arguments.")
        leaves, treedef = jax.tree.flatten(args)
        axes = [_positive(a, leaf) for a, leaf in zip(_for_each(places, args), leaves, strict=True)]
        _check_batch(rows, leaves, axes)
        kept: dict[str, Any] = {}

        def one(row: jax.Array, *values: Any) -> list[Any]:
            whole = [v if a is None else jnp.expand_dims(v, a) for v, a in zip(values, axes, strict=True)]
            result = inner(_at_row(bank, row), *jax.tree.unflatten(treedef, whole))
            found, kept["tree"] = jax.tree.flatten(result)
            kept["axes"] = [_positive(a, leaf) for a, leaf in zip(_for_each(out_axes, result), found, strict=True)]
            return [v if a is None else jnp.squeeze(v, a) for v, a in zip(found, kept["axes"], strict=True)]

        def front(row: jax.Array, *values: Any) -> tuple[list[Any], list[Any]]:
            found = one(row, *values)
            return _split(found, kept["axes"])

        batched, shared = jax.vmap(front, (0, *axes), (0, None), spmd_axis_name=spmd_axis_name)(rows, *leaves)
        given = iter(batched), iter(shared)
        moved = [next(given[1]) if a is None else jnp.moveaxis(next(given[0]), 0, a) for a in kept["axes"]]
        return jax.tree.unflatten(kept["tree"], moved)

    return wrapped


def _split(values: list[Any], axes: list[int | None]) -> tuple[list[Any], list[Any]]:
    """Results with rows, and those without."""
    pairs = list(zip(values, axes, strict=True))
    return [v for v, a in pairs if a is not None], [v for v, a in pairs if a is None]


def _for_each(prefix: Any, tree: Any) -> list[Any]:
    """The axis of every leaf of a tree, from a tree of axes that may end above the leaves."""
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree, is_leaf=_is_none), is_leaf=_is_none)


def _is_none(value: Any) -> bool:
    return value is None


def _positive(axis: int | None, leaf: Any) -> int | None:
    return None if axis is None else axis % max(np.ndim(leaf), 1)


def _at_row(bank: PyTree, row: jax.Array) -> PyTree:
    """The tree in which every bank of adapters uses one row's."""

    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, row=row, base=one(leaf.base)) if isinstance(leaf, BANKS) else leaf

    return map_with_paths(lambda path, leaf: one(leaf), bank)


def _check_rows(bank: PyTree, rows: jax.Array) -> None:
    banks = [leaf for leaf in jax.tree.leaves(bank, is_leaf=is_weight) if isinstance(leaf, BANKS)]
    if not banks:
        raise StructureError("per_row: the tree holds no bank of adapters; make one by sj.bank(params, adapters).")
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"per_row: rows is {rows.dtype}{list(rows.shape)}; expected one integer for each row of the batch."
        )
    slots = banks[0].slots
    if is_tracer(rows) or not rows.size:
        return
    first, last = np.min(np.asarray(rows)), np.max(np.asarray(rows))  # concrete also inside a trace
    if not 0 <= first <= last < slots:
        raise ValueError(f"per_row: rows name slots {first} to {last}, and the bank has 0 to {slots - 1}.")


def _check_batch(rows: jax.Array, leaves: list[Any], axes: list[int | None]) -> None:
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is not None and (np.ndim(leaf) <= axis or np.shape(leaf)[axis] != rows.shape[0]):
            raise ValueError(
                f"per_row: {rows.shape[0]} rows are named, and an argument of shape {np.shape(leaf)} should have them "
                f"on axis {axis}. Say by in_axes where each argument has its rows; None for those without."
            )
