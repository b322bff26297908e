"""The difference of two trainings, one with an auxiliary objective, as something to add to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from subspace_jax.core import (
    Params,
    PatternError,
    StructureError,
    leaves_with_paths,
    map_with_paths,
    matches,
    nearest,
    resolve_links,
    select_paths,
)
from subspace_jax.merging import Selector, wide_array


def capability_vector(auxiliary: Params, plain: Params, *, select: Selector | None = None) -> Params:
    r"""Returns what an auxiliary objective adds to a training: \(\gamma = \theta_{ao} - \theta_{ft}\).

    Both are trained from the same weights on the same data in the same order; what the task itself changes is in both
    and cancels. Modules that only the auxiliary loss has are not in `plain`, and are dropped.

    Args:
      auxiliary: \(\theta_{ao}\), trained with the auxiliary objective; arrays or stand-in weights.
      plain: \(\theta_{ft}\), trained without it.
      select: which leaves of `plain` belong to the vector; all that hold floating-point numbers if None. Heads that are
        made anew for every task are left out.

    Returns:
      A tree like `plain` of arrays in float32, with None for leaves that do not belong.

    Raises:
      StructureError: a leaf of `plain` is missing in `auxiliary` or has another shape there.
      PatternError: `select` matches nothing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> home = sj.methods.capvector
      >>> vector = home.capability_vector({"w": jnp.ones(2), "projection": jnp.ones(3)}, {"w": jnp.zeros(2)})
      >>> vector["w"].tolist()
      [1.0, 1.0]
    """
    chosen = None if select is None else set(select_paths(plain, select))
    other = dict(leaves_with_paths(resolve_links(auxiliary)))

    def one(path: str, leaf: Any) -> Any:
        if not is_floating(leaf) or (chosen is not None and path not in chosen):
            return None
        if path not in other or tuple(other[path].shape) != tuple(leaf.shape):
            came = tuple(other[path].shape) if path in other else f"none; nearest are {nearest(path, other)}"
            raise StructureError(
                f"{path}: capability_vector: the plain training has shape {tuple(leaf.shape)} here, the auxiliary one "
                f"{came}. Both start from the same model; leave a leaf of one alone out by select=."
            )
        return wide_array(other[path]) - wide_array(leaf)

    return map_with_paths(one, resolve_links(plain))


def add_capability(
    params: Params, vectors: Params | Sequence[Params], alpha: float | Mapping[str, float] | Sequence[Any] = 1.0
) -> Params:
    r"""Adds capability vectors to a model: \(\theta_{meta} = \theta_{pt} + \sum_i \alpha_i \gamma_i\).

    Args:
      params: \(\theta_{pt}\), plain arrays.
      vectors: one vector, or a list of them.
      alpha: one strength, or strengths by path or glob, of which the first match counts and 0 where none does; with a
        list of vectors a list of these.

    Returns:
      A tree like `params`, added in float32 and cast once.

    Raises:
      StructureError: a vector has a leaf that `params` has not, or of another shape; or as many strengths are missing.
      PatternError: a glob of `alpha` matches no leaf.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> added = sj.methods.capvector.add_capability({"w": jnp.ones(2)}, {"w": jnp.ones(2)}, alpha=0.5)
      >>> added["w"].tolist()
      [1.5, 1.5]
    """
    several = isinstance(vectors, (list, tuple))
    given = list(vectors) if several else [vectors]
    strengths = list(alpha) if several and isinstance(alpha, (list, tuple)) else [alpha] * len(given)
    if len(strengths) != len(given):
        raise StructureError(f"add_capability: {len(strengths)} strengths for {len(given)} vectors; give one each.")
    paths = [path for path, _ in leaves_with_paths(params)]
    for one in strengths:
        for pattern in one if isinstance(one, Mapping) else ():
            if not any(matches(pattern, path) for path in paths):
                raise PatternError(
                    f"add_capability: alpha has {pattern!r}, which matches no leaf; nearest are "
                    f"{nearest(pattern, paths)}."
                )
    by_path = [dict(leaves_with_paths(vector)) for vector in given]
    for i, leaves in enumerate(by_path):
        for path in set(leaves) - set(paths):
            raise StructureError(f"{path}: vector {i} has this leaf, the parameters have not.")

    def add(path: str, leaf: Any) -> Any:
        total = None
        for leaves, strength in zip(by_path, strengths, strict=True):
            change = leaves.get(path)
            if change is None:
                continue
            if tuple(change.shape) != tuple(leaf.shape):
                raise StructureError(f"{path}: a vector has shape {tuple(change.shape)}, the leaf {tuple(leaf.shape)}.")
            amount = _strength(strength, path) * change
            total = amount if total is None else total + amount
        return leaf if total is None else (wide_array(leaf) + total).astype(leaf.dtype)

    return map_with_paths(add, params)


def _strength(alpha: Any, path: str) -> Any:
    if not isinstance(alpha, Mapping):
        return alpha
    return next((value for pattern, value in alpha.items() if matches(pattern, path)), 0.0)


def is_floating(leaf: Any) -> bool:
    """Tells whether a leaf holds floating-point numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
