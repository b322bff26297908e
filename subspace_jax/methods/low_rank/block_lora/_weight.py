"""A low-rank addition whose upper factor is a sum of blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import register_weight, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import AsLowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLowRank(AsLowRank):
    r"""A frozen array and a low-rank product of one head and a sum of arms: \(W + s\,A\,(B_1 + \dots + B_n)\).

    The arms are summed before the product, in float32, so a step multiplies with factors of the head's rank.

    Attributes:
      head: \(A\), `[*stack, in, r / n]`.
      arms: \(B_i\), `[*stack, n, r / n, out]`.
      arm_dropout: probability of dropping a row of an arm in training.
    """

    head: jax.Array
    arms: jax.Array
    arm_dropout: float = static(default=0.0)

    divisible: ClassVar[tuple[str, ...]] = ("in", "out")
    axes: ClassVar[Mapping[str, str]] = {**AsLowRank.axes, "head": "stack in rank", "arms": "stack arm rank out"}

    @property
    def rank(self) -> int:
        r"""The rank that the addition can have, \(r / n\); the nominal one is \(n\) times as large."""
        return self.head.shape[-1]

    @property
    def blocks(self) -> int:
        """The number of arms."""
        return self.arms.shape[-3]

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return bool(self.dropout or self.arm_dropout)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Returns the head and the sum of the arms, less what a training step drops of them."""
        wide = wide_dtype(self.head.dtype)
        arms = self.arms.astype(wide)
        if self.arm_dropout and self.dropout_key is not None:
            keep = 1.0 - self.arm_dropout
            masks = _masks(self.dropout_key, keep, self.arms.shape[-3:-1])
            arms = arms * (masks.astype(wide) / keep)[..., None]
        return self.head.astype(wide), jnp.sum(arms, axis=-3)


def _masks(keys: jax.Array, keep: float, shape: tuple[int, ...]) -> jax.Array:
    """Which rows of which arms stay, `[*stack, arms, rank]`."""
    draw = functools.partial(jax.random.bernoulli, p=keep, shape=shape)
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    # Other bits than those of the inputs' dropout, which has the same keys.
    fold = functools.partial(jax.random.fold_in, data=0xA2)
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return draw(fold(keys))
