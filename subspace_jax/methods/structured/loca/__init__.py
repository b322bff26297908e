"""LoCA: trains a few cosine coefficients of the change of a weight, and their locations."""

from subspace_jax.core import register
from subspace_jax.methods.structured.loca._alternating import AlternatingState as AlternatingState
from subspace_jax.methods.structured.loca._alternating import alternating as alternating
from subspace_jax.methods.structured.loca._method import cosine_values as cosine_values
from subspace_jax.methods.structured.loca._method import fix_locations as fix_locations
from subspace_jax.methods.structured.loca._method import loca as loca
from subspace_jax.methods.structured.loca._weight import CosineSpectrum as CosineSpectrum
from subspace_jax.methods.structured.loca._weight import Evaluation as Evaluation

__all__ = [
    "AlternatingState",
    "CosineSpectrum",
    "Evaluation",
    "alternating",
    "cosine_values",
    "fix_locations",
    "loca",
]

register(
    __name__,
    title="LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
    authors="Du et al.",
    year=2025,
    kinds=("weight", "transformation"),
    use_for="Very small files: some thousands of coefficients, placed anywhere in the spectrum.",
    not_for="A step's time counts (two to eight times LoRA's on a CPU), or the change has a white spectrum.",
    differs=(
        "Several ways of evaluation give the same numbers; `highest=1.0` reaches the last frequencies that the "
        "published bound leaves out."
    ),
)
