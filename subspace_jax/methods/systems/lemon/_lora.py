"""Which kernels of the network get a LoRA, and how it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from subspace_jax.core import Method, Role
from subspace_jax.methods.low_rank.lora import lora
from subspace_jax.weights import LowRank

_ATTENTION = ("query", "key", "value", "output")


def lemon_lora(rank: int = 64, alpha: float = 5.0) -> Method:
    r"""Adapts a kernel by \(W + \alpha A B\): `A` has variance 1/r, `B` is zero, and alpha is not divided by r.

    Args:
      rank: \(r\).
      alpha: \(\alpha\); `sj.lora` and PEFT call the same `alpha * rank`.

    Returns:
      A method for `sj.adapt`, whose weights are `LowRank`.

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: `alpha` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": lemon_lora(2)}, key=jax.random.key(0))
      >>> float(adapted["w"].scale)
      5.0
    """
    plain = lora(rank, alpha=alpha * rank, init="gaussian")

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        made: Any = plain.init(key, array, role, stats)
        # Drawn with deviation 1 / r there; an embedding starts the other way round.
        return made if role.kind == "embedding" else dataclasses.replace(made, a=made.a * np.float32(np.sqrt(rank)))

    return Method("lemon_lora", make)


def lora_rules(rank: int = 64, alpha: float = 5.0, *, official_targets: bool = False) -> dict[str, Method]:
    """Returns rules for `sj.adapt`: kernels of attention, of feed-forward parts, and of the small networks at the ends.

    In the official code queries, keys and values are not adapted, and the adapter of attention's output has no effect.

    Args:
      rank: of every adapter.
      alpha: their scale.
      official_targets: leave attention out, as the official code does in effect.

    Returns:
      Methods by glob.

    Example:
      >>> len(lora_rules()), len(lora_rules(official_targets=True))
      (8, 4)
    """
    method = lemon_lora(rank, alpha)
    targets = ["**/ffn_in/kernel", "**/ffn_out/kernel", "*_mlp/dense_0/kernel", "*_mlp/dense_1/kernel"]
    if not official_targets:
        targets += [f"**/attention/{name}/kernel" for name in _ATTENTION]
    return dict.fromkeys(targets, method)
