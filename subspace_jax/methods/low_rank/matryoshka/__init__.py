"""MatryoshkaLoRA and DyLoRA: train one adapter that can be cut to any smaller rank."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.matryoshka._method import at_rank as at_rank
from subspace_jax.methods.low_rank.matryoshka._method import matryoshka as matryoshka
from subspace_jax.methods.low_rank.matryoshka._method import sample_rank as sample_rank
from subspace_jax.methods.low_rank.matryoshka._method import training_gains as training_gains
from subspace_jax.methods.low_rank.matryoshka._method import truncate_rank as truncate_rank
from subspace_jax.methods.low_rank.matryoshka._weight import NestedLowRank as NestedLowRank
from subspace_jax.methods.low_rank.matryoshka._weight import RankScale as RankScale

__all__ = [
    "NestedLowRank",
    "RankScale",
    "at_rank",
    "matryoshka",
    "sample_rank",
    "training_gains",
    "truncate_rank",
]

register(
    __name__,
    title="MatryoshkaLoRA: Learning Accurate Hierarchical Low-Rank Representations for LLM Fine-Tuning",
    authors="Modoranu, Safaryan, Alistarh",
    year=2026,
    kinds=("weight",),
    use_for="One training whose adapter is cut to any smaller rank when it is served.",
    not_for="Only one rank is needed, or the smallest ranks matter most: DyLoRA's small ranks are better.",
    differs=(
        '`inference="keep_p"` keeps the gains of training and is better here than the published scale of the rank '
        "alone."
    ),
)
