"""Sums of concepts, and what one concept adds to a sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Full, Params, StructureError, is_tracer, is_weight, leaves_with_paths, map_with_paths
from subspace_jax.linalg import wide_matmul
from subspace_jax.merging import Factored, formed, read_change, task_arithmetic
from subspace_jax.methods.low_rank.orthogonal_adaptation._weight import ConceptLowRank


def merge_concepts(
    concepts: Sequence[Params], base: Params, *, weights: float | Sequence[float] | jax.Array = 1.0
) -> Params:
    r"""Adds concepts that were trained apart: \(W + \sum_i \lambda_i\,s_i\,Q_i\,b_i\), exactly and in factors.

    `sj.merging.task_arithmetic` after a check that the concepts belong together: on one seed and one kind of basis,
    and with disjoint columns where they have slots. Concepts may differ in rank, scale and the size of their columns,
    and in what they adapt. The order of concepts does not matter.

    Args:
      concepts: trees that `adapt` made with `orthogonal_adaptation`, trained. Other leaves may be arrays, or `Full`.
      base: the tree that they were made of.
      weights: \(\lambda_i\), one for all or one each; the publication takes one below 1 for all.

    Returns:
      A tree like `base`, with a `LowRank` of the sum of the ranks wherever a concept has a weight.

    Raises:
      StructureError: concepts have other bases, or share columns of a slot; or what `task_arithmetic` refuses.
      ValueError: there are not as many weights as concepts.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> from subspace_jax.methods.low_rank.orthogonal_adaptation import merge_concepts, orthogonal_adaptation
      >>> params = {"w": jnp.ones((6, 4))}
      >>> rules = [{"w": orthogonal_adaptation(2, concept=i)} for i in (0, 1)]
      >>> concepts = [sj.adapt(params, rule, key=jax.random.key(0)) for rule in rules]
      >>> merge_concepts(concepts, params)["w"].a.shape
      (6, 4)
    """
    found: dict[str, list[tuple[int, ConceptLowRank]]] = {}
    for i, tree in enumerate(concepts):
        for path, leaf in leaves_with_paths(tree):
            if isinstance(leaf, ConceptLowRank):
                found.setdefault(path, []).append((i, leaf))
            elif is_weight(leaf) and not isinstance(leaf, Full):
                raise StructureError(
                    f"{path}: concept {i} has a {type(leaf).__name__} of {leaf.method!r} here, whose columns are not "
                    "known to be apart from others'; use sj.merging.task_arithmetic for adapters of other methods."
                )
    for path, several in found.items():
        for other in several[1:]:
            _check_together(path, several[0], other)
        _check_disjoint(path, several)
    return task_arithmetic(concepts, base, weights=weights)


def extract_concept(merged: Params, base: Params, concept: Params) -> Params:
    r"""Takes one concept out of a sum of concepts: \(\lambda_i \delta_i = Q_i Q_i^T (W' - W) / c^2\).

    Exact where the concepts have slots and nothing else changed the weights.

    Args:
      merged: the sum, as `merge_concepts` or `merge` returned it: adapters or plain arrays.
      base: the tree that the concepts were made of; the sum alone does not tell.
      concept: an adapted tree of the wanted concept, as it starts or trained; only its columns and scales are read.

    Returns:
      A tree like `concept`, whose `b` is what the sum has of it, \(\lambda_i\) included.

    Raises:
      StructureError: `concept` has no weight of `orthogonal_adaptation`, or one that has no slot, or `merged` lacks
        its path.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> home = sj.methods.orthogonal_adaptation
      >>> params = {"w": jnp.ones((6, 4))}
      >>> rules = [{"w": home.orthogonal_adaptation(2, concept=i)} for i in (0, 1)]
      >>> concepts = [sj.adapt(params, rule, key=jax.random.key(0)) for rule in rules]
      >>> merged = sj.merge(home.merge_concepts(concepts, params))
      >>> home.extract_concept(merged, params, concepts[0])["w"].b.shape
      (2, 4)
    """
    sums, bases = dict(leaves_with_paths(merged)), dict(leaves_with_paths(base))
    if not any(isinstance(leaf, ConceptLowRank) for _, leaf in leaves_with_paths(concept)):
        raise StructureError("extract_concept: the concept has no weight of orthogonal_adaptation.")

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, ConceptLowRank):
            return leaf
        for name, tree in (("merged", sums), ("base", bases)):
            if path not in tree or tuple(tree[path].shape) != tuple(leaf.shape):
                raise StructureError(f"{path}: {name} has no leaf of the concept's shape {tuple(leaf.shape)} here.")
        if leaf.mode != "slot":
            raise StructureError(
                f"{path}: the concept's mode is {leaf.mode!r}; only columns of slots are apart from all others', so "
                'only mode="slot" can be taken out of a sum.'
            )
        change = read_change(path, sums[path], bases[path])
        q = leaf.a.astype(jnp.float32)
        left = jnp.swapaxes(q, -1, -2)
        if isinstance(change, Factored) and change.gain is None:
            coordinates = wide_matmul(wide_matmul(left, change.a), change.b)
        else:
            coordinates = wide_matmul(left, leaf.role.matrix(formed(change, bases[path])))
        size = jnp.sum(q * q, axis=-2)[..., :, None] * leaf.scale
        return dataclasses.replace(leaf, b=(coordinates / size).astype(leaf.b.dtype))

    return map_with_paths(one, concept)


def _check_together(path: str, first: tuple[int, ConceptLowRank], other: tuple[int, ConceptLowRank]) -> None:
    """Refuses two concepts of different bases."""
    (i, one), (j, two) = first, other
    for name in ("mode", "basis"):
        if getattr(one, name) != getattr(two, name):
            raise StructureError(
                f"{path}: concept {i} has {name}={getattr(one, name)!r} and concept {j} {getattr(two, name)!r}, so "
                "their columns are not of one basis. Train both with equal options."
            )
    seeds = [w.seed for w in (one, two)]
    if not any(map(is_tracer, seeds)) and not np.array_equal(np.asarray(seeds[0]), np.asarray(seeds[1])):
        values = [tuple(int(v) for v in np.asarray(seed)) for seed in seeds]
        raise StructureError(
            f"{path}: concept {i} is of the basis with seed {values[0]} and concept {j} with {values[1]} (master seed, "
            "hash of the kernel), so their columns are not of one basis. All concepts need the same seed=, and "
            "per_kernel= or not."
        )


def _check_disjoint(path: str, several: Sequence[tuple[int, ConceptLowRank]]) -> None:
    """Refuses concepts with slots that share columns."""
    owners: dict[int, int] = {}
    for i, weight in several:
        if weight.mode != "slot" or is_tracer(weight.columns):
            continue
        for column in np.asarray(weight.columns).tolist():
            j = owners.setdefault(column, i)
            if j != i:
                raise StructureError(
                    f"{path}: concepts {j} and {i} share column {column} of the basis. Each needs its own concept=, "
                    "and with different ranks slots overlap: concept 1 of rank 8 is concepts 2 and 3 of rank 4."
                )
