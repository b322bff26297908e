"""Whole systems: a model part with its own training."""

from subspace_jax.methods.systems import gcr as gcr

__all__ = [
    "gcr",
]
