"""Whole systems: a model part with its own training."""

from subspace_jax.methods.systems import deep_subspace_clustering as deep_subspace_clustering
from subspace_jax.methods.systems import gcr as gcr
from subspace_jax.methods.systems import hypernetwork as hypernetwork
from subspace_jax.methods.systems import lemon as lemon

__all__ = [
    "deep_subspace_clustering",
    "gcr",
    "hypernetwork",
    "lemon",
]
