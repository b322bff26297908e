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
)
