"""Parameterisations: what can stand where a weight array stood."""

from subspace_jax.weights._low_rank import LowRank as LowRank

__all__ = ["LowRank"]
