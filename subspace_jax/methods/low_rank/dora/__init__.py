"""DoRA: trains the direction of a weight by any method and the magnitude of its columns apart."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.dora import _merging  # noqa: F401  registers how DoRAs merge
from subspace_jax.methods.low_rank.dora._method import dora as dora
from subspace_jax.methods.low_rank.dora._weight import Magnitude as Magnitude

__all__ = [
    "Magnitude",
    "dora",
]

register(
    __name__,
    title="DoRA: Weight-Decomposed Low-Rank Adaptation",
    authors="Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen",
    year=2024,
    kinds=("weight",),
    experiment="quickstart",
    use_for="LoRA whose lengths of output columns learn apart, at one low rate and small ranks.",
    not_for="Many adapters are served at once, or every percent of a step's time counts.",
    differs=(
        'The norm is held fixed in the backward pass by default, as the authors advise; `norm="exact"` '
        "differentiates it."
    ),
)
