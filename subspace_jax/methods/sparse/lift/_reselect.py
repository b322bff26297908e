"""Selects the trained entries of sparse weights anew, and moves the optimizer's state with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from subspace_jax.core import (
    Method,
    Params,
    StructureError,
    is_weight,
    key_for,
    leaves_with_paths,
    map_with_paths,
    partition,
    path_string,
)
from subspace_jax.weights import SparseDelta, migrate_entries

S = TypeVar("S")


def reselect_principal(adapted: Params, state: S, method: Method, *, key: jax.Array) -> tuple[Params, S]:
    r"""Writes the trained values of a sparse method into their weights and selects new entries from the result.

    A position that is selected again keeps its value in float32 and its moments; a new one starts with moments of
    zero; those of positions that left are dropped. Counters continue, so the first step of a new position is larger by
    the factor that the bias correction no longer takes away. Shapes stay: compile this once, next to the step.

    Args:
      adapted: tree with `SparseDelta` weights.
      state: the optimizer's state; every array in it that stands at the place of a weight's trained values, and has
        their shape, is taken along. Other arrays stay.
      method: what selects: the `lift(...)` that made the weights. Only weights of its name are touched.
      key: a random key, consumed; used by a randomized decomposition.

    Returns:
      The tree and the state after the selection; both of the structure and shapes that they had.

    Raises:
      StructureError: no weight is of this method, or it now selects another number of entries.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> method = sj.lift(rank=1, filter_rank=1)
      >>> adapted = sj.adapt({"w": jnp.arange(12.0).reshape(4, 3)}, {"w": method}, key=jax.random.key(0))
      >>> state = optax.adam(1e-3).init(sj.partition(adapted)[0])
      >>> adapted, state = jax.jit(reselect_principal, static_argnums=2)(adapted, state, method, key=jax.random.key(1))
      >>> adapted["w"].count
      7
    """
    before = {path: w for path, w in leaves_with_paths(adapted) if is_weight(w) and w.method == method.name}
    if not before:
        raise StructureError(
            f"No weight was made by {method.name!r}; pass the method that made them, and the tree that adapt() gave."
        )
    after = {path: _select(path, weight, method, key_for(key, path)) for path, weight in before.items()}
    moves = {path: _Move(before[path].indices, after[path].indices) for path in before}
    return map_with_paths(lambda path, leaf: after.get(path, leaf), adapted), _migrate(adapted, state, moves)


def refresh_due(step: jax.Array | int, every: int) -> Any:
    r"""Tells whether entries are selected anew after optimizer step number `step` (1, 2, ...).

    \((n + 1) \bmod T = 0\), so the first time is after step \(T - 1\), as in the released program.

    Args:
      step: the number of the step just made; a Python int or an int32 scalar.
      every: \(T\).

    Example:
      >>> [n for n in range(1, 13) if refresh_due(n, 5)]
      [4, 9]
    """
    return (step + 1) % every == 0


@dataclasses.dataclass(frozen=True)
class _Move:
    """From which positions to which; no pytree, so that it is one leaf."""

    old: jax.Array
    new: jax.Array

    def __call__(self, value: jax.Array) -> jax.Array:
        return migrate_entries(value, self.old, self.new)


def _select(path: str, weight: Any, method: Method, key: jax.Array) -> SparseDelta:
    """The weight with its values written into it and others selected."""
    if not isinstance(weight, SparseDelta) or weight.mode != "set" or weight.active is not None:
        raise StructureError(
            f"{path}: is a {type(weight).__name__} whose entries cannot be selected anew; expected a SparseDelta in "
            'mode "set" whose values are all active, as lift() makes.'
        )
    new = method.init(key, weight.materialize(), weight.role, None)
    if not isinstance(new, SparseDelta) or new.indices.shape != weight.indices.shape:
        raise StructureError(
            f"{path}: {method.name} selected {weight.count} entries and now selects "
            f"{getattr(new, 'count', 'none')}; pass the method with the options that made this weight."
        )
    values = migrate_entries(weight.values, weight.indices, new.indices, new.values)
    return dataclasses.replace(weight, base=new.base, indices=new.indices, values=values)


def _migrate(adapted: Params, state: S, moves: Mapping[str, Callable[[jax.Array], jax.Array]]) -> S:
    """The state with every array at the place of moved values moved along.

    Transformations hold trees of the structure of what learns, at places of their own: the end of such an array's
    path is the path of the values.
    """
    learned = jax.tree_util.tree_leaves_with_path(partition(adapted)[0])
    places = {keys: (path_string(keys[:-1]), value.shape) for keys, value in learned}
    longest = sorted(places, key=len, reverse=True)

    def one(keys: tuple[Any, ...], value: Any) -> Any:
        place = next((p for p in longest if keys[-len(p) :] == p), None)
        if place is None:
            return value
        path, shape = places[place]
        return moves[path](value) if path in moves and getattr(value, "shape", None) == shape else value

    return jax.tree_util.tree_map_with_path(one, state)
