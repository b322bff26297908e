"""LoRA: trains a low-rank addition to a frozen weight, with rank-stabilized scaling as an option."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Method,
    Role,
    check_choice,
    check_dtype,
    check_probability,
    check_rank,
    register,
    require_matrix,
)
from subspace_jax.weights import LowRank, hidden_zeros, lora_scale

__all__ = [
    "lora",
]


def lora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains a low-rank addition to a frozen weight: \(W + s\,a\,b\), with \(b = 0\) at the start.

    \(s = \alpha / r\), or \(\alpha / \sqrt{r}\) with `rank_stabilized`. Serves dense kernels of any number of axes,
    convolutions (a convolution with `rank` output features, then a 1x1 one), embeddings (there \(a = 0\) and
    \(b \sim N(0, 1)\)), and stacks of layers (one adapter per layer).

    Args:
      rank: \(r\); more than the weight's smaller side is allowed and wasteful.
      alpha: \(\alpha\); `rank` if None, so that \(s = 1\) (or \(\sqrt{r}\) when rank-stabilized).
      rank_stabilized: scale by \(\alpha / \sqrt{r}\), which keeps the size of updates independent of the rank.
      dropout: probability of dropping an input of the adapter in training; see `with_dropout`.
      init: "kaiming" draws \(a\) from \(U(-1/\sqrt{d_{in}}, 1/\sqrt{d_{in}})\), "gaussian" from \(N(0, 1/r^2)\).
      dtype: dtype of `a` and `b`, float32 or bfloat16.

    Returns:
      A method whose weights are `LowRank` with `a` `[*stack, in, rank]` and `b` `[*stack, rank, out]`.

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: `alpha` is not positive, `dropout` is not in [0, 1), `init` is none of those, or `dtype` is float16,
        in which Adam gives NaN.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2, alpha=4)}, key=jax.random.key(0))
      >>> adapted["w"].a.shape, adapted["w"].b.shape, float(adapted["w"].scale)
      ((6, 2), (2, 4), 2.0)

    References:
      Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023.
    """
    rank, dtype = check_rank(rank, what="lora: rank"), check_dtype("lora: dtype", dtype)
    check_probability("lora: dropout", dropout)
    check_choice("lora: init", init, ("kaiming", "gaussian"))
    scale = lora_scale(rank, alpha, rank_stabilized, what="lora: alpha")

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        del stats
        require_matrix(array, role)
        a, b = _factors(key, array.shape, role, rank, init, dtype)
        return LowRank(
            base=array,
            a=a,
            b=b,
            scale=scale,
            rank_stabilized=bool(rank_stabilized),
            dropout=dropout,
            role=role,
            dtype=array.dtype,
            trainable=("a", "b"),
        )

    return Method("rslora" if rank_stabilized else "lora", make, on_stored=True)


def _factors(
    key: jax.Array, shape: tuple[int, ...], role: Role, rank: int, init: str, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Draws `a` and `b` in float32, so that the same key gives the same adapter in every dtype."""
    stack, (inputs, outputs) = role.stack_shape(shape), role.sizes(shape)
    a_shape, b_shape = (*stack, inputs, rank), (*stack, rank, outputs)
    if role.kind == "embedding":
        return hidden_zeros(key, a_shape, dtype), jax.random.normal(key, b_shape, jnp.float32).astype(dtype)
    if init == "gaussian":
        a = jax.random.normal(key, a_shape, jnp.float32) / rank
    else:
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
    return a.astype(dtype), hidden_zeros(key, b_shape, dtype)


register(
    __name__,
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors="Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen",
    year=2022,
    kinds=("weight",),
    experiment="quickstart",
    use_for="The first try, whatever the task: every tool loads it, and many adapters fit in one batch.",
    not_for="The change that is wanted has full rank, or the base is to be kept exactly in chosen directions.",
)
