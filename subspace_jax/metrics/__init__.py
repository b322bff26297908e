"""Scores that compare methods over ranks, tasks and representations."""

from subspace_jax.metrics._aurac import aurac as aurac

__all__ = ["aurac"]
