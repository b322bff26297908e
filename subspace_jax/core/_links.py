"""Fields that several stand-in weights share: stored in one of them, read by all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from subspace_jax.core._errors import StructureError, nearest
from subspace_jax.core._paths import leaves_with_paths, map_with_paths
from subspace_jax.core._types import PyTree
from subspace_jax.core._weight import Weight, is_weight, nested_weights


def resolve_links(tree: PyTree) -> PyTree:
    """Returns the tree with every linked field filled in from the weight that stores it.

    A weight that shares an array names it in `links` and leaves its own field empty, so the tree holds, saves,
    counts, trains and moves the array once. Functions that use weights call this first; under a trace nothing is
    copied, and gradients of all readers add up in the one that stores.

    Args:
      tree: any tree with stand-in weights, at any depth below where `adapt` saw it.

    Returns:
      A tree of the same leaves; weights without links are the same objects.

    Raises:
      StructureError: the weight that stores a field is not in the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> resolve_links({"kernel": jnp.ones(2)})["kernel"].shape
      (2,)
    """
    filled = resolved({path: leaf for path, leaf in leaves_with_paths(tree) if is_weight(leaf)})
    return map_with_paths(lambda path, leaf: filled.get(path, leaf), tree)


def resolved(weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """Returns the weights of one tree, by path, with every linked field filled in."""
    if not any(one.links for weight in weights.values() for one in nested_weights(weight).values()):
        return weights
    return {path: _filled(path, weight, weights) for path, weight in weights.items()}


def _filled(path: str, weight: Weight, weights: Mapping[str, Weight]) -> Weight:
    inner = {n: _filled(path, v, weights) for n, v in weight.data_items() if isinstance(v, Weight)}
    linked = {}
    for field, owner, source in weight.links:
        if getattr(weight, field) is not None:  # filled in before, and perhaps taken out of its tree
            continue
        # Inside a larger tree ({"params": ...}) paths are longer; of two adapted trees, the reader's own counts.
        found = [(p, w) for p, w in weights.items() if p == owner or p.endswith(f"/{owner}")]
        found.sort(key=lambda item: _common(item[0], path))
        holders = nested_weights(found[-1][1]).values() if found else ()
        values = [getattr(w, source) for w in holders if source in w.data_names()]
        value = next((v for v in values if v is not None), None)
        if value is None:
            raise StructureError(
                f"{path}: its {field!r} is stored as {source!r} at {owner}, which this tree does not hold; nearest "
                f"are {nearest(owner, weights)}. Pass the whole tree that adapt() made."
            )
        linked[field] = value
    return dataclasses.replace(weight, **inner, **linked) if inner or linked else weight


def _common(left: str, right: str) -> int:
    """Length of the common beginning of two paths."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
