"""`pego`: starts a group of low-rank additions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Method, Role, check_dtype, check_int, check_rank, require_matrix
from subspace_jax.methods.low_rank.pego._weight import GroupLowRank
from subspace_jax.weights import hidden_zeros


def pego(rank: int = 4, *, modules: int = 4, dtype: Any = jnp.float32) -> Method:
    r"""Trains a group of low-rank additions to a frozen weight, \(W + \sum_{i \le N} A_i B_i\), for `pego.penalty`.

    Without the penalty the group is one LoRA of rank \(N r\) with scale 1, step by step; the penalty, added to the
    loss, keeps the additions orthogonal to the weight and to each other. All of them see all data.

    Args:
      rank: \(r\), of each addition.
      modules: \(N\); published are 4, and 2 for PACS.
      dtype: dtype of the factors.

    Returns:
      A method whose weights are `GroupLowRank`, with \(N r (d_{in} + d_{out})\) trained values: `a`
      `[*stack, in, N r]`, uniform up to \(1/\sqrt{d_{in}}\), drawn for each addition from a key of its own, and `b`
      `[*stack, N r, out]`, zero.

    Raises:
      RankError: `rank` or `modules` is not a positive integer.
      ValueError: `dtype` is float16.

    Note:
      Published for the query and value kernels of a vision transformer, with its other kernels frozen and a new head.
      A fused kernel of query, key and value is to be split first, or the keys are adapted as well. The authors' code
      trains in half precision and casts to float32 around the optimizer's step; here the factors are float32.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 5))}, {"w": sj.methods.pego.pego(1, modules=3)}, key=jax.random.key(0))
      >>> adapted["w"].a.shape, sj.summary(adapted).trainable, float(sj.methods.pego.penalty(adapted))
      ((6, 3), 33, 0.0)
    """
    rank, modules = check_rank(rank, what="pego: rank"), check_int("pego: modules", modules)
    dtype = check_dtype("pego: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> GroupLowRank:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        bound = 1.0 / math.sqrt(inputs)

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (*stack, inputs, rank), jnp.float32, -bound, bound)

        a = jnp.moveaxis(jax.vmap(draw)(jax.random.split(key, modules)), 0, -2)
        return GroupLowRank(
            base=array,
            a=a.reshape(*stack, inputs, modules * rank).astype(dtype),
            b=hidden_zeros(key, (*stack, modules * rank, outputs), dtype),
            modules=modules,
            role=role,
            dtype=array.dtype,
            trainable=("a", "b"),
        )

    return Method("pego", make)
