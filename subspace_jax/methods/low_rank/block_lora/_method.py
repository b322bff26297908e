"""`block_lora`: starts a head and its arms, and turns them into plain LoRA."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Method,
    Params,
    RankError,
    Role,
    check_dtype,
    check_int,
    check_probability,
    check_rank,
    require_matrix,
)
from subspace_jax.methods.low_rank.block_lora._weight import BlockLowRank
from subspace_jax.weights import LowRank, hidden_zeros, lora_scale, map_weights


def block_lora(
    rank: int = 2,
    *,
    blocks: int = 2,
    alpha: float = 1.0,
    rank_stabilized: bool = True,
    dropout: float = 0.0,
    arm_dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains one lower block and several upper ones that are added: \(W + s\,A\,(B_1 + \dots + B_n)\).

    A LoRA of rank \(r\) cut into \(n\) blocks along its rank, whose lower blocks are all one: products of blocks become
    sums. The addition has rank \(r / n\) at most, \(r d_{in} / n + r d_{out}\) trained values, and the operations of a
    LoRA of rank \(r / n\), beside \((n - 1)\,r\,d_{out} / n\) additions a step.

    All arms get one gradient, so arms that start equal stay equal bit by bit, and the whole is the LoRA of rank
    \(r / n\) whose upper factor learns at \(n\) times the rate: exactly so for SGD and Adam, and for decoupled decay
    with \(1 / n\) of it on that factor. Clipping by a global norm breaks this: it sees \(\sqrt n\) times the norm.

    Args:
      rank: \(r\), the nominal rank, which the publication calls the rank.
      blocks: \(n\), which divides it; 1 is LoRA.
      alpha: \(s = \alpha / \sqrt r\), of the nominal rank, as in the CLIP-LoRA code that the publication extends.
      rank_stabilized: False for \(s = \alpha / r\).
      dropout: probability of dropping an input of the head in training, one mask for all arms; CLIP-LoRA has 0.25.
      arm_dropout: probability of dropping a row of an arm for one training step, for each arm on its own, the kept
        ones scaled up by one over the rest. In this design it alone makes arms differ; not of the publication.
      dtype: dtype of head and arms.

    Returns:
      A method whose weights are `BlockLowRank` with `head` `[*stack, in, r / n]`, uniform up to
      \(1 / \sqrt{d_{in}}\), and `arms` `[*stack, n, r / n, out]`, zero.

    Raises:
      RankError: `rank` or `blocks` is not a positive integer, or `blocks` does not divide `rank`.
      ValueError: another option is out of its range.

    Note:
      Published for the query, key and value kernels of both encoders of CLIP, with AdamW at 2e-4, decay 1e-2 and
      500 steps for each shot. L2 in the loss acts on the sum of arms \(n\) times less than on LoRA's factor under Adam.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.block_lora.block_lora(4, blocks=2)
      >>> adapted = sj.adapt({"w": jnp.ones((6, 5))}, {"w": method}, key=jax.random.key(0))
      >>> adapted["w"].head.shape, adapted["w"].arms.shape, sj.summary(adapted).trainable
      ((6, 2), (2, 2, 5), 32)
    """
    rank, blocks = check_rank(rank, what="block_lora: rank"), check_int("block_lora: blocks", blocks)
    if rank % blocks:
        raise RankError(f"block_lora: blocks={blocks} does not divide rank={rank}; the rank is cut into equal blocks.")
    scale = lora_scale(rank, alpha, rank_stabilized, what="block_lora: alpha")
    check_probability("block_lora: dropout", dropout)
    check_probability("block_lora: arm_dropout", arm_dropout)
    dtype = check_dtype("block_lora: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> BlockLowRank:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        size, bound = rank // blocks, 1.0 / math.sqrt(inputs)
        return BlockLowRank(
            base=array,
            head=jax.random.uniform(key, (*stack, inputs, size), jnp.float32, -bound, bound).astype(dtype),
            arms=hidden_zeros(key, (*stack, blocks, size, outputs), dtype),
            scale=scale,
            rank_stabilized=bool(rank_stabilized),
            dropout=dropout,
            arm_dropout=arm_dropout,
            role=role,
            dtype=array.dtype,
            trainable=("head", "arms"),
        )

    return Method("block_lora", make)


def to_lora(adapted: Params) -> Params:
    r"""Turns heads and arms into plain LoRA of rank \(r / n\), to be saved or served alone.

    The scale stays, so a reader that divides alpha by the rank needs \(\alpha = s\,r / n\), and one that divides it by
    the root \(\alpha = s \sqrt{r / n}\); `save_peft` writes it so.

    Args:
      adapted: a tree with weights of `block_lora`, also inside `dora`; other leaves stay as they are.

    Returns:
      The tree with `LowRank` weights, the arms summed.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.block_lora.block_lora(4, blocks=2)
      >>> adapted = sj.adapt({"w": jnp.ones((6, 5))}, {"w": method}, key=jax.random.key(0))
      >>> sj.methods.block_lora.to_lora(adapted)["w"].b.shape
      (2, 5)
    """

    def one(path: str, weight: BlockLowRank) -> LowRank:
        del path
        still = dataclasses.replace(weight, dropout_key=None).plain()
        a, b = still.a.astype(weight.head.dtype), still.b.astype(weight.arms.dtype)
        return dataclasses.replace(still, a=a, b=b, method="lora")

    return map_weights(BlockLowRank, one, adapted)
