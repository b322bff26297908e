"""QLoRA: trains a low-rank addition to a weight that stays stored in 4 bits, or in the blocks of its file."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Method, Role, Weight, check_choice, is_weight, register, require_matrix
from subspace_jax.methods.low_rank.lora import lora
from subspace_jax.weights import LowRank, quantize_nf4

__all__ = [
    "qlora",
]


def qlora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    double_quantization: bool = True,
    order: Literal["out_in", "in_out"] = "out_in",
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains a low-rank addition to a frozen weight that is stored in few bits: \(\hat W + s\,a\,b\).

    An array is quantized to NF4: blocks of 64 entries with a scale each, and scales that are quantized again (4.127
    bits a value). A weight that is stored already, such as the blocks of a GGUF file that was loaded with
    `packed=True`, stays as it is, to the bit. Used as \(x \hat W + (s\,(x a))\,b\) with \(\hat W\) formed where it is
    used, one layer at a time, and once more in the backward pass; \(\hat W + s\,a\,b\) is formed by `merge` alone.

    Args:
      rank: \(r\); see `lora`.
      alpha: \(\alpha\); `rank` if None.
      rank_stabilized: scale by \(\alpha / \sqrt{r}\).
      dropout: probability of dropping an input of the adapter in training; see `with_dropout`.
      double_quantization: quantize the scales of the blocks as well.
      order: order of consecutive entries in a block of NF4; see `NF4`.
      dtype: dtype of `a` and `b`, float32 or bfloat16.

    Returns:
      A method whose weights are `LowRank` with an `NF4` base, or on the stored weight that they were given.

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: an option is out of its range; see `lora`.

    Warning:
      `merge` gives the dense array \(\hat W + s\,a\,b\) in the weight's dtype: quantizing it again would lose a part of
      what was learned. `save_peft` writes the factors of an adapter on a stored base, which PEFT puts on the model
      whose numbers the blocks mean; of an array that was quantized here it writes none, since they would go on others.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (256, 256))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.qlora(rank=8)}, key=jax.random.key(0))
      >>> frozen = sj.partition(adapted)[1]
      >>> round(8 * sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) / w.size, 2)
      4.13
      >>> jax.tree.map(jnp.shape, jax.tree.leaves(sj.partition(adapted)[0]))
      [(256, 8), (8, 256)]
    """
    inner = lora(rank, alpha=alpha, rank_stabilized=rank_stabilized, dropout=dropout, dtype=dtype)
    check_choice("qlora: order", order, ("out_in", "in_out"))

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Weight:
        require_matrix(array, role)
        weight = inner.init(key, array, role, stats)
        if is_weight(array) or not isinstance(weight, LowRank):
            return weight
        base = quantize_nf4(array, role, order, double=bool(double_quantization))
        return dataclasses.replace(weight, base=dataclasses.replace(base, dtype=array.dtype))

    return Method("qlora", make, on_stored=True)


register(
    __name__,
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
    year=2023,
    kinds=("weight",),
    use_for="The base does not fit: it stays packed in 4 bits or in its GGUF file's own blocks while LoRA learns.",
    not_for="The base fits in bfloat16, where LoRA takes no time to unpack it and keeps all its digits.",
    differs="Scales of scales are float8 over one mean, as published; a GGUF file's blocks are a base as well.",
)
