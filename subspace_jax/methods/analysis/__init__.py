"""Published analyses of what training does to a model."""

from subspace_jax.methods.analysis import gist as gist
from subspace_jax.methods.analysis import intruder_dimensions as intruder_dimensions
from subspace_jax.methods.analysis import subspace_ad as subspace_ad

__all__ = [
    "gist",
    "intruder_dimensions",
    "subspace_ad",
]
