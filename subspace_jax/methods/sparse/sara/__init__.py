"""SaRA: trains the entries of smallest magnitude, with a nuclear-norm penalty and a second selection halfway."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.sara._export import export as export
from subspace_jax.methods.sparse.sara._export import with_strength as with_strength
from subspace_jax.methods.sparse.sara._method import default_rate as default_rate
from subspace_jax.methods.sparse.sara._method import sara as sara
from subspace_jax.methods.sparse.sara._method import threshold_for as threshold_for
from subspace_jax.methods.sparse.sara._nuclear import PenaltyMode as PenaltyMode
from subspace_jax.methods.sparse.sara._nuclear import nuclear_norm as nuclear_norm
from subspace_jax.methods.sparse.sara._step import ScaleBySaraState as ScaleBySaraState
from subspace_jax.methods.sparse.sara._transform import sara_adam as sara_adam
from subspace_jax.methods.sparse.sara._transform import scale_by_sara as scale_by_sara

__all__ = [
    "PenaltyMode",
    "ScaleBySaraState",
    "default_rate",
    "export",
    "nuclear_norm",
    "sara",
    "sara_adam",
    "scale_by_sara",
    "threshold_for",
    "with_strength",
]

register(
    __name__,
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    authors="Hu, Zhang, Yi, Huang, Wang, Ma",
    year=2025,
    kinds=("weight", "transformation", "penalty"),
    use_for="Tuning all parts of a model a little while the source task stays.",
    not_for="The change is large, or arrays differ in scale: one threshold for all arrays may take one of them whole.",
    differs=(
        '`mode="random_one"` follows the release, "all" the paper\'s text; `threshold_for`, a share in place of a '
        "threshold, is of this library."
    ),
)
