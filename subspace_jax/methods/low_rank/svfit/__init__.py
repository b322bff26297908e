"""SVFit: trains the largest singular values of a weight and nothing else."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.svfit._method import svfit as svfit
from subspace_jax.methods.low_rank.svfit._weight import SplitSVD as SplitSVD

__all__ = [
    "SplitSVD",
    "svfit",
]

register(
    __name__,
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    authors="Sun et al.",
    year=2024,
    kinds=("weight",),
    use_for="A few hundred trained values, between the weight's own singular vectors.",
    not_for="Files must be small (the frozen factors are large), or the wanted change lies outside those directions.",
)
