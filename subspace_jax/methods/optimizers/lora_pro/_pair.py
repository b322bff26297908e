"""Finds the two factors of every low-rank addition in a tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import PyTree, StructureError, is_weight, leaves_with_paths
from subspace_jax.weights import LowRank


class Pair(NamedTuple):
    """Positions of the two factors of one low-rank addition.

    Attributes:
      a: index of \\(A\\), `[*stack, in, rank]`, among `jax.tree.leaves` of the trainable tree.
      b: index of \\(B\\), `[*stack, rank, out]`.
      scale: \\(s\\).
    """

    a: int
    b: int
    scale: float


PairFn = Callable[[Any], Sequence[Pair]]


def low_rank_pairs(tree: PyTree) -> list[Pair]:
    """Returns the factor pairs of every `LowRank` stand-in of a trainable tree, inside other weights too.

    Args:
      tree: the trainable tree of `partition`, or gradients of it.

    Raises:
      StructureError: there is none, or one has only one factor to learn.
    """
    pairs, place = [], 0
    for path, leaf in leaves_with_paths(tree):
        if is_weight(leaf):
            place = _pairs_of(path, leaf, place, pairs)
        else:
            place += 1
    if not pairs:
        raise StructureError("LoRA-Pro: the tree has no LowRank stand-in; adapt it with lora(...) or pissa(...).")
    return pairs


def _pairs_of(path: str, weight: Any, place: int, pairs: list[Pair]) -> int:
    """Enters the pairs of a weight whose first array is at `place`; returns the place after its last."""
    places: dict[str, int] = {}
    for name, value in weight.data_items():
        if is_weight(value):
            place = _pairs_of(path, value, place, pairs)
            continue
        if arrays := len(jax.tree.leaves(value)):  # a mask leaves nothing
            places[name] = place
            place += arrays
    # Gains between the factors would make the map from factors to weight another one.
    if type(weight) is LowRank:
        if not {"a", "b"} <= set(places):
            raise StructureError(f"{path}: LoRA-Pro adjusts both factors together; here only {sorted(places)} learn.")
        pairs.append(Pair(places["a"], places["b"], weight.scale))
    return place


def groups_of(pairs: Sequence[Pair], values: Sequence[jax.Array]) -> list[list[Pair]]:
    """Groups pairs of equal shapes, scales and layouts, so that layers are computed at once."""
    groups: dict[Any, list[Pair]] = {}
    for one in pairs:
        kinds = ((v.shape, v.dtype, jax.typeof(v).sharding) for v in (values[one.a], values[one.b]))
        groups.setdefault((*kinds, one.scale), []).append(one)
    return list(groups.values())


def stacked(group: Sequence[Pair], values: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of a group of equal shapes, each stacked along a new first axis."""
    return jnp.stack([values[one.a] for one in group]), jnp.stack([values[one.b] for one in group])
