"""SSF: trains a scale and a shift of every layer's outputs."""

from subspace_jax.core import register
from subspace_jax.methods.structured.ssf._complete import complete_norms as complete_norms
from subspace_jax.methods.structured.ssf._method import fold as fold
from subspace_jax.methods.structured.ssf._method import ssf as ssf
from subspace_jax.methods.structured.ssf._weight import Scaled as Scaled
from subspace_jax.methods.structured.ssf._weight import ScaledShifted as ScaledShifted
from subspace_jax.methods.structured.ssf._weight import ShiftedBias as ShiftedBias

__all__ = [
    "Scaled",
    "ScaledShifted",
    "ShiftedBias",
    "complete_norms",
    "fold",
    "ssf",
]

register(
    __name__,
    title="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
    authors="Lian, Zhou, Feng, Wang",
    year=2022,
    kinds=("weight",),
    use_for="The smallest adapter that costs nothing when served, beside norms and biases.",
    not_for="The change needs new mixtures of features, not other scales.",
)
