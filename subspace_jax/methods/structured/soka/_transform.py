"""Prunes SoKA's Kronecker terms between steps, and moves the norms of their factors into scales.

SoKA: Singular Value Decomposition (SVD) on Kronecker Adaptation for Large Language Models (Chong, Qu, 2025).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from subspace_jax.core import Params
from subspace_jax.linalg import Combine, count_terms, kronecker_sum, wide_dtype
from subspace_jax.methods.structured.soka._weight import KroneckerSum
from subspace_jax.weights import map_weights


def prune_terms(
    adapted: Params, *, energy: float = 0.95, combine: Combine = "min", least: int = 1, most: int | None = None
) -> Params:
    r"""Retires the terms of SoKA that training has left small, without changing the function.

    By the criteria of `soka`, on the terms' norms \(|\sigma_c| \|U_c\| \|V_c\|\) in place of singular values. What a
    retired term contributes goes into the frozen base; it is masked, and gets no gradient any more. Shapes and
    structure stay, so that a compiled step still serves.

    Args:
      adapted: the whole adapted tree (`combine` it first).
      energy: share of the sum of squared norms that the terms in use hold.
      combine: "min" (or "max") of the number of terms by energy and of that before the elbow, or one of them alone.
      least: at least so many terms stay.
      most: at most so many terms stay.

    Returns:
      The tree with other masks and bases. The optimizer's moments of retired terms may stay as they are.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jnp.kron(jnp.eye(4), jnp.ones((4, 4))) + 1e-3 * jax.random.normal(jax.random.key(1), (16, 16))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.soka(terms=3)}, key=jax.random.key(0))
      >>> sj.methods.soka.prune_terms(adapted)["w"].mask.tolist()
      [1.0, 0.0, 0.0]
    """

    def prune(path: str, weight: KroneckerSum) -> KroneckerSum:
        del path
        importance = weight.importance()
        order = jnp.argsort(-importance, axis=-1)
        ranked = jnp.take_along_axis(importance, order, axis=-1)
        used = weight.mask > 0
        kept = count_terms(ranked, energy, combine, least=least, most=most, count=jnp.sum(used, axis=-1))
        stays = used & (jnp.argsort(order, axis=-1) < kept[..., None])
        mask = stays.astype(weight.mask.dtype)
        wide = wide_dtype(weight.base.dtype)
        retired = kronecker_sum(weight.sigma * (weight.mask - mask), weight.left, weight.right)
        base = weight.base.astype(wide) + weight.role.unmatrix(retired, weight.shape)
        return dataclasses.replace(weight, mask=mask, base=base.astype(weight.base.dtype))

    return map_weights(KroneckerSum, prune, adapted)


def normalize_terms(adapted: Params) -> Params:
    r"""Moves the norms of SoKA's factors into their scales, without changing the function.

    \(\sigma_c \leftarrow \sigma_c \|U_c\| \|V_c\|\), and both factors of norm 1; use it after each step, or never.

    Args:
      adapted: an adapted tree, or the trainable part of one.

    Returns:
      A tree of the same structure.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(16)}, {"w": sj.soka(terms=1)}, key=jax.random.key(0))
      >>> doubled = jax.tree.map(lambda v: 2.0 * v, sj.partition(adapted)[0])
      >>> scale = sj.methods.soka.normalize_terms(doubled)["w"].sigma / adapted["w"].sigma
      >>> round(float(scale[0]), 4)
      8.0
    """

    def normalize(path: str, weight: KroneckerSum) -> KroneckerSum:
        del path
        norms = (jnp.sqrt(jnp.sum(v * v, axis=(-2, -1))) for v in (weight.left, weight.right))
        left, right = (jnp.where(n > 0, n, 1.0) for n in norms)
        return dataclasses.replace(
            weight,
            sigma=weight.sigma * left * right,
            left=weight.left / left[..., None, None],
            right=weight.right / right[..., None, None],
        )

    return map_weights(KroneckerSum, normalize, adapted)
