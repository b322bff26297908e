"""Comp-LoRA: keeps a low-rank addition orthogonal to a weight's leading singular directions."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.comp_lora._bases import principal_bases as principal_bases
from subspace_jax.methods.low_rank.comp_lora._method import comp_lora as comp_lora
from subspace_jax.methods.low_rank.comp_lora._method import confine as confine
from subspace_jax.methods.low_rank.comp_lora._method import reproject as reproject
from subspace_jax.methods.low_rank.comp_lora._method import to_lora as to_lora
from subspace_jax.methods.low_rank.comp_lora._weight import ComplementLowRank as ComplementLowRank

__all__ = [
    "ComplementLowRank",
    "comp_lora",
    "confine",
    "principal_bases",
    "reproject",
    "to_lora",
]

register(
    __name__,
    title="Complementary Subspace Low-Rank Adaptation of Vision-Language Models for Few-Shot Classification",
    authors="Wang, Dai, Li, Li, Guo, Xiang",
    year=2025,
    kinds=("weight",),
    uses=("project_orthogonal",),
    use_for="Tuning on little data while singular directions that carry the old knowledge stay exactly as they are.",
    not_for="The new task needs those directions: what is kept is paid for with what is not learned.",
    differs=(
        "The paper's rule for the number of protected directions was not to be had; it is an option here, or "
        "follows from the spectrum."
    ),
)
