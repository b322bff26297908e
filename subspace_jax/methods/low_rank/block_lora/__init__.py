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
)
