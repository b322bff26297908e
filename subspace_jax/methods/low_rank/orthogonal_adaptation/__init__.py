"""Orthogonal Adaptation: gives every concept its own columns of one shared basis, so that adapters can be summed."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.orthogonal_adaptation._basis import overlap as overlap
from subspace_jax.methods.low_rank.orthogonal_adaptation._merge import extract_concept as extract_concept
from subspace_jax.methods.low_rank.orthogonal_adaptation._merge import merge_concepts as merge_concepts
from subspace_jax.methods.low_rank.orthogonal_adaptation._method import orthogonal_adaptation as orthogonal_adaptation
from subspace_jax.methods.low_rank.orthogonal_adaptation._weight import ConceptLowRank as ConceptLowRank

__all__ = [
    "ConceptLowRank",
    "extract_concept",
    "merge_concepts",
    "orthogonal_adaptation",
    "overlap",
]

register(
    __name__,
    title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
    authors="Po, Yang, Aberman, Wetzstein",
    year=2024,
    kinds=("weight",),
    use_for="Concepts trained apart by people who share nothing but a seed, and summed later.",
    not_for="Experts can be merged with knowledge of each other, or there is no token that learns beside each adapter.",
    differs="Columns can be dealt out without overlap, which the paper draws at random.",
)
