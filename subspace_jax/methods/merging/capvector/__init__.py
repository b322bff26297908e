"""CapVector: adds what an auxiliary objective taught one training to others, and keeps them from undoing it."""

from subspace_jax.core import register
from subspace_jax.methods.merging.capvector._penalty import avoid_directions as avoid_directions
from subspace_jax.methods.merging.capvector._penalty import capability_penalty as capability_penalty
from subspace_jax.methods.merging.capvector._penalty import factor_penalty as factor_penalty
from subspace_jax.methods.merging.capvector._penalty import input_directions as input_directions
from subspace_jax.methods.merging.capvector._vector import add_capability as add_capability
from subspace_jax.methods.merging.capvector._vector import capability_vector as capability_vector

__all__ = [
    "add_capability",
    "avoid_directions",
    "capability_penalty",
    "capability_vector",
    "factor_penalty",
    "input_directions",
]

register(
    __name__,
    title="CapVector: Learning Transferable Capability Vectors in Parametric Space for Vision-Language-Action Models",
    authors="Song, Zhao, Li et al.",
    year=2026,
    kinds=("penalty",),
    use_for="A skill learned once with a costly auxiliary loss, carried over to trainings of the same base.",
    not_for="The new training starts from other weights, or the skill and the task use the same directions.",
    differs="The paper's form of the penalty was not to be had: four candidates are offered.",
)
