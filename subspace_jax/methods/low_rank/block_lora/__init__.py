"""Block-LoRA: adds the upper blocks of a low-rank product over one shared lower block."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.block_lora._bound import generalization_ratio as generalization_ratio
from subspace_jax.methods.low_rank.block_lora._method import block_lora as block_lora
from subspace_jax.methods.low_rank.block_lora._method import to_lora as to_lora
from subspace_jax.methods.low_rank.block_lora._weight import BlockLowRank as BlockLowRank

__all__ = [
    "BlockLowRank",
    "block_lora",
    "generalization_ratio",
    "to_lora",
]

register(
    __name__,
    title="One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
    authors="Zhou, Shen, Yu, Bu, Wang",
    year=2025,
    kinds=("weight",),
    use_for="Small files at a given nominal rank, with shared lower blocks.",
    not_for="You expect more than LoRA of rank r / n: it is that LoRA, whose upper factor learns n times as fast.",
    differs=(
        "`arm_dropout` is of this library: without it arms that start equal stay equal. Alpha is divided by the "
        "root of the nominal rank, as in the code that the paper extends."
    ),
)
