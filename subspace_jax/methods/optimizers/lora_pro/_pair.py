"""Finds the two factors of every low-rank addition in a tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import PyTree, StructureError, is_tracer, is_weight, leaves_with_paths, nested_weights
from subspace_jax.weights import LowRank


class Pair(NamedTuple):
    r"""Positions of the two factors of one low-rank addition.

    Attributes:
      a: index of \\(A\\), `[*stack, in, rank]`, among `jax.tree.leaves` of the trainable tree.
      b: index of \\(B\\), `[*stack, rank, out]`.
      scale: \(s\).
    """

    a: int
    b: int
    scale: float


PairFn = Callable[[Any], Sequence[Pair]]


def low_rank_pairs(tree: PyTree, scales: Mapping[str, float] | None = None) -> list[Pair]:
    r"""Returns the factor pairs of every `LowRank` stand-in of a trainable tree, inside other weights too.

    Args:
      tree: the trainable tree of `partition`, or gradients of it.
      scales: \(s\) of each by path, as `scales_of` gives them; those that stand in the tree if None.

    Raises:
      StructureError: there is none, one has only one factor to learn, or its scale is not known.
    """
    scales = scales_of(tree) if scales is None else scales
    pairs, place = [], 0
    for path, leaf in leaves_with_paths(tree):
        if is_weight(leaf):
            place = _pairs_of(path, leaf, place, pairs, scales)
        else:
            place += 1
    if not pairs:
        raise StructureError("LoRA-Pro: the tree has no LowRank stand-in; adapt it with lora(...) or pissa(...).")
    return pairs


def scales_of(adapted: PyTree) -> dict[str, float]:
    """Returns the scale of every `LowRank` stand-in of a tree by path, inside other weights too.

    Args:
      adapted: what `adapt` returned, or the frozen tree of its `partition`.

    Raises:
      StructureError: the scales are being traced.
    """

    weights = (nested_weights(leaf, path) for path, leaf in leaves_with_paths(adapted) if is_weight(leaf))
    scales = {
        path: weight.scale
        for found in weights
        for path, weight in found.items()
        if type(weight) is LowRank and weight.scale is not None
    }
    if traced := [path for path, scale in scales.items() if is_tracer(scale)]:
        raise StructureError(f"{traced[0]}: LoRA-Pro reads scales when it is made; make it outside of jax.jit.")
    return {path: float(scale) for path, scale in scales.items()}


def _pairs_of(path: str, weight: Any, place: int, pairs: list[Pair], scales: Mapping[str, float]) -> int:
    """Enters the pairs of a weight whose first array is at `place`; returns the place after its last."""
    places: dict[str, int] = {}
    for name, value in weight.data_items():
        if is_weight(value):
            place = _pairs_of(f"{path}.{name}", value, place, pairs, scales)
            continue
        if arrays := len(jax.tree.leaves(value)):  # a mask leaves nothing
            places[name] = place
            place += arrays
    # Gains between the factors would make the map from factors to weight another one.
    if type(weight) is LowRank:
        if not {"a", "b"} <= set(places):
            raise StructureError(f"{path}: LoRA-Pro adjusts both factors together; here only {sorted(places)} learn.")
        if path not in scales:
            raise StructureError(
                f"{path}: the scale of this addition is not known: the trainable tree holds what learns alone. Make "
                "the transformation with adapted=, the tree that adapt() returned."
            )
        pairs.append(Pair(places["a"], places["b"], scales[path]))
    return place


def pair_finder(adapted: PyTree | None, pairs: PairFn | None) -> PairFn:
    """Returns `pairs`, or else the function that finds `LowRank` stand-ins with the scales of `adapted`."""
    if pairs is not None:
        return pairs
    scales = None if adapted is None else scales_of(adapted)
    return lambda tree: low_rank_pairs(tree, scales)


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
