"""What SaRA learned with a strength, and several of them added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, StructureError, check_number, is_weight, leaves_with_paths, map_with_paths
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.sara._nuclear import chosen
from subspace_jax.weights import SparseDelta, entries_at, entries_on_host, unflat_entries


def with_strength(adapted: Params, strength: float | jax.Array) -> Params:
    r"""Returns the tree with what was learned at another strength, \(P + \alpha\,(p - P_M)\).

    It is a tree like the one given: `sj.merge` makes arrays of it, `sj.save_adapter` a small file. 1 is the model as it
    was trained and 0 the pretrained one, both to the last bit. Values that the second selection retired count too.

    Args:
      adapted: a tree with weights from `sara`.
      strength: \(\alpha\), any finite number, also above 1 or below 0; or a scalar array, which may be traced.

    Raises:
      StructureError: no weight of `sara` is in the tree.
      ValueError: the number is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.array([0.1, 5.0])}, {"w": sj.methods.sara.sara(1.0)}, key=jax.random.key(0))
      >>> moved = jax.tree.map(lambda v: v + 1.0, sj.partition(adapted)[0])
      >>> half = with_strength(sj.combine(moved, sj.partition(adapted)[1]), 0.5)
      >>> [round(v, 6) for v in sj.merge(half)["w"].tolist()]
      [0.6, 5.0]
    """
    if not isinstance(strength, jax.Array):
        check_number("with_strength: strength", strength)
    found = _found(adapted, "with_strength")

    def one(path: str, weight: Any) -> Any:
        if path not in found:
            return weight
        wide = wide_dtype(weight.values.dtype)
        start = entries_at(weight.base, weight.indices, weight.role).astype(wide)
        values = (1.0 - strength) * start + strength * weight.values.astype(wide)
        return dataclasses.replace(weight, values=values.astype(weight.values.dtype))

    return map_with_paths(one, adapted)


def export(*tuned: Params, strengths: float | Sequence[float] = 1.0) -> Params:
    r"""Returns ordinary arrays with what several trees learned added up, \(P + \sum_i \alpha_i (p_i - P_{M_i})\).

    What none of them trained stays \(P\) to the last bit. Computed on the host in float64 and rounded once, so that one
    tree at strength 1 is `sj.merge` of it, and the order of trees does not matter.

    Args:
      *tuned: trees with weights from `sara` on the same arrays; they may select other entries, and other leaves.
      strengths: \(\alpha_i\), one for each tree or one for all; finite.

    Raises:
      StructureError: there is no such weight, there is another stand-in, or trees stand on other arrays.
      ValueError: there are not as many strengths as trees, or one is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.array([0.5, 4.0])}, {"w": sj.methods.sara.sara(1.0)}, key=jax.random.key(0))
      >>> moved = jax.tree.map(lambda v: v + 1.0, sj.partition(adapted)[0])
      >>> one = sj.combine(moved, sj.partition(adapted)[1])
      >>> export(one, one, strengths=(1.0, -0.25))["w"].tolist()
      [1.25, 4.0]
    """
    factors = [strengths] * len(tuned) if isinstance(strengths, (int, float)) else list(strengths)
    if len(factors) != len(tuned) or not tuned:
        raise ValueError(f"export: {len(factors)} strengths for {len(tuned)} trees; give one for each.")
    for factor in factors:
        check_number("export: strength", factor)
    found = [_found(tree, "export") for tree in tuned]
    plain = [dict(leaves_with_paths(tree)) for tree in tuned]
    for leaves, weights in zip(plain, found, strict=True):
        _check_same(leaves, weights, plain[0], found[0])

    def one(path: str, leaf: Any) -> Any:
        parts = [(weights[path], factor) for weights, factor in zip(found, factors, strict=True) if path in weights]
        return _added(parts) if parts else leaf

    return map_with_paths(one, tuned[0])


def _added(parts: Sequence[tuple[SparseDelta, float]]) -> jax.Array:
    weight = parts[0][0]
    start = entries_on_host(weight.base, weight.role).astype(np.float64)
    changes = np.zeros((*start.shape[:-1], start.shape[-1] + 1))  # the last one takes what is padding
    for one, factor in parts:
        at = np.asarray(one.indices)
        held = np.concatenate([start, np.zeros((*start.shape[:-1], 1))], axis=-1)
        values = np.asarray(one.values, np.float64) - np.take_along_axis(held, at, axis=-1)
        np.put_along_axis(changes, at, np.take_along_axis(changes, at, axis=-1) + factor * values, axis=-1)
    flat = jnp.asarray((start + changes[..., :-1]).astype(wide_dtype(weight.dtype)))
    return unflat_entries(flat, weight.role, weight.shape).astype(weight.dtype)


def _found(adapted: Params, what: str) -> dict[str, SparseDelta]:
    found = chosen(adapted)
    if not found:
        raise StructureError(f"{what}: no weight of sara is in the tree; give what adapt() made and training moved.")
    return found


def _check_same(leaves: Any, weights: dict[str, SparseDelta], first: Any, found: dict[str, SparseDelta]) -> None:
    """Refuses trees of other leaves, on other arrays, or with other stand-ins."""
    if leaves.keys() != first.keys():
        odd = sorted(leaves.keys() ^ first.keys())
        raise StructureError(f"{odd[0]}: export: is in one of the trees only; all must be made of the same parameters.")
    for path, leaf in leaves.items():
        if is_weight(leaf) and path not in weights:
            raise StructureError(
                f"{path}: export: is a {type(leaf).__name__} of {leaf.method!r}; only weights of sara have a strength. "
                "merge() the tree without them, or leave this leaf out of the rules."
            )
        own, other = (
            (found[path].base if path in found else first[path]),
            (weights[path].base if path in weights else leaf),
        )
        if own is not other and not (own.shape == other.shape and bool(jnp.array_equal(own, other))):
            raise StructureError(
                f"{path}: export: the trees stand on different arrays here, so their changes do not add up to a model. "
                "Train them on the same parameters."
            )
