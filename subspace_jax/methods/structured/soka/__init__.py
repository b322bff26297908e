"""SoKA: trains the leading terms of a weight's Kronecker decomposition."""

from subspace_jax.core import register
from subspace_jax.methods.structured.soka._method import soka as soka
from subspace_jax.methods.structured.soka._terms import active_values as active_values
from subspace_jax.methods.structured.soka._terms import to_kronecker as to_kronecker
from subspace_jax.methods.structured.soka._transform import normalize_terms as normalize_terms
from subspace_jax.methods.structured.soka._transform import prune_terms as prune_terms
from subspace_jax.methods.structured.soka._weight import KroneckerSum as KroneckerSum

__all__ = [
    "KroneckerSum",
    "active_values",
    "normalize_terms",
    "prune_terms",
    "soka",
    "to_kronecker",
]

register(
    __name__,
    title="Singular Value Decomposition (SVD) on Kronecker Adaptation for Large Language Models",
    authors="Chong, Qu",
    year=2025,
    kinds=("weight", "transformation"),
    use_for="Structured changes that are sums of Kronecker products, starting from the weight's own.",
    not_for="A step's time counts (twice LoRA's), or files must be small: the start is saved with them.",
)
