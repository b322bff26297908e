"""Counts SoKA's terms, and rewrites them on the original weight in place of the residual."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from subspace_jax.core import Params
from subspace_jax.linalg import kronecker_sum, kronecker_svd
from subspace_jax.methods.structured.soka._weight import KroneckerSum
from subspace_jax.weights import map_weights, original_arrays


def active_values(adapted: Params) -> int:
    r"""Counts the trained values of SoKA's terms in use, \(\sum r (m n + p q + 1)\).

    What `summary` counts as trainable, of SoKA's weights alone.

    Args:
      adapted: an adapted tree with concrete arrays.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(16)}, {"w": sj.soka(terms=3)}, key=jax.random.key(0))
      >>> sj.methods.soka.active_values(adapted), sj.methods.soka.active_values(sj.methods.soka.prune_terms(adapted))
      (99, 33)
    """
    counts: list[int] = []

    def count(path: str, weight: KroneckerSum) -> KroneckerSum:
        del path
        counts.append(int(jnp.sum(weight.mask)) * weight.split.values)
        return weight

    map_weights(KroneckerSum, count, adapted)
    return sum(counts)


def to_kronecker(adapted: Params, params: Params) -> Params:
    r"""Rewrites SoKA's weights as Kronecker sums on the untouched arrays.

    The change is the sum of the terms now less that at the start: twice the terms on the original weight. Where terms
    were pruned, what they left in the base is decomposed again and comes as terms as well.

    Args:
      adapted: a tree with weights from `soka`; other leaves stay as they are.
      params: the tree that `adapt` was given.

    Returns:
      The tree with the original arrays as bases.

    Raises:
      StructureError: a path of `adapted` is not in `params` with the same shape.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jax.random.normal(jax.random.key(1), (16, 16))}
      >>> adapted = sj.adapt(params, {"w": sj.soka(terms=2)}, key=jax.random.key(0))
      >>> sj.methods.soka.to_kronecker(adapted, params)["w"].sigma.shape
      (4,)
    """
    originals = original_arrays(params)

    def convert(path: str, weight: KroneckerSum) -> KroneckerSum:
        original = originals(path, weight)
        sums = [(weight.scales, weight.left, weight.right)]
        moved = weight.role.matrix(weight.base.astype(jnp.float32) - original.astype(jnp.float32))
        if weight.start_sigma is not None and weight.start_left is not None and weight.start_right is not None:
            start = weight.start_sigma, weight.start_left, weight.start_right
            sums.append((-start[0], *start[1:]))
            moved = moved + kronecker_sum(*start)
            retired = (weight.mask == 0) & (weight.start_sigma != 0)
        else:
            retired = weight.mask == 0
        count = int(jnp.max(jnp.sum(retired, axis=-1)))
        if count:
            left = kronecker_svd(moved, weight.split, count)
            sums.append((left.s, left.left, left.right))
        depth = weight.sigma.ndim - 1
        sigma, left, right = (jnp.concatenate(parts, axis=depth) for parts in zip(*sums, strict=True))
        rest = {"start_sigma": None, "start_left": None, "start_right": None, "mask": jnp.ones_like(sigma)}
        return dataclasses.replace(weight, base=original, sigma=sigma, left=left, right=right, **rest)

    return map_weights(KroneckerSum, convert, adapted)
