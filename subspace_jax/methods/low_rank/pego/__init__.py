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
    use_for="Changing features little while a new domain is learned, with a penalty that needs no old data.",
    not_for="The best accuracy on the new domain is all that counts: no factor of the penalty helps there.",
    differs="The penalty sums absolute entries, as run by the authors; it can be normalized by width.",
)
