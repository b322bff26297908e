"""OrthoMerge: merges experts as rotations of the base's weights, and the rest as ordinary updates."""

from subspace_jax.core import register
from subspace_jax.methods.merging.orthomerge._group import procrustes as procrustes
from subspace_jax.methods.merging.orthomerge._group import to_algebra as to_algebra
from subspace_jax.methods.merging.orthomerge._group import to_group as to_group
from subspace_jax.methods.merging.orthomerge._method import orthomerge as orthomerge

__all__ = [
    "orthomerge",
    "procrustes",
    "to_algebra",
    "to_group",
]

register(
    __name__,
    title="Orthogonal Model Merging",
    authors="Yang, Shi, Liu",
    year=2026,
    kinds=("merger",),
    use_for="Merging OFT adapters, or experts whose changes are mostly rotations, at the base's singular values.",
    not_for="Experts are LoRA of small rank: task arithmetic keeps them as one adapter.",
)
