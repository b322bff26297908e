"""SNELLA: lets entries compete inside layers, and layers for a budget of entries, of a mixed kernel's matrix."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.snella._budget import budget as budget
from subspace_jax.methods.sparse.snella._budget import kept_entries as kept_entries
from subspace_jax.methods.sparse.snella._budget import share_out as share_out
from subspace_jax.methods.sparse.snella._importance import Metric as Metric
from subspace_jax.methods.sparse.snella._importance import WithImportanceState as WithImportanceState
from subspace_jax.methods.sparse.snella._importance import reallocate as reallocate
from subspace_jax.methods.sparse.snella._importance import with_importance as with_importance
from subspace_jax.methods.sparse.snella._method import MixedKernelSparse as MixedKernelSparse
from subspace_jax.methods.sparse.snella._method import snella as snella

__all__ = [
    "Metric",
    "MixedKernelSparse",
    "WithImportanceState",
    "budget",
    "kept_entries",
    "reallocate",
    "share_out",
    "snella",
    "with_importance",
]

register(
    __name__,
    title="Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
    authors="Shen, Sun, Wang, Huang",
    year=2025,
    kinds=("weight", "transformation"),
    use_for="Layers that compete for a budget of trained entries.",
    not_for="All layers have to change alike: even shares fit as well.",
    differs="`least`, entries that every layer keeps, is of this library, and 0 as published.",
)
