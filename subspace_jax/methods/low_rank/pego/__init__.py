"""PEGO: trains a group of low-rank additions that a penalty keeps orthogonal to the weight and to each other."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.pego._method import pego as pego
from subspace_jax.methods.low_rank.pego._penalty import PegoTerms as PegoTerms
from subspace_jax.methods.low_rank.pego._penalty import penalty as penalty
from subspace_jax.methods.low_rank.pego._penalty import penalty_terms as penalty_terms
from subspace_jax.methods.low_rank.pego._weight import GroupLowRank as GroupLowRank

__all__ = [
    "GroupLowRank",
    "PegoTerms",
    "pego",
    "penalty",
    "penalty_terms",
]

register(
    __name__,
    title="Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain "
    "Generalization",
    authors="Hu, Zhang, Qi, Shi, Gao",
    year=2024,
    kinds=("weight", "penalty"),
)
