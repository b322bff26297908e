"""Published analyses of what training does to a model."""

from subspace_jax.methods.analysis import intruder_dimensions as intruder_dimensions

__all__ = [
    "intruder_dimensions",
]
