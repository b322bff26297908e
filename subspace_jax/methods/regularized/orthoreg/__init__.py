"""OrthoReg: pushes every update of a weight toward orthonormal columns, so that task vectors interfere less."""

from subspace_jax.core import register
from subspace_jax.methods.regularized.orthoreg._analysis import disentanglement_error as disentanglement_error
from subspace_jax.methods.regularized.orthoreg._analysis import task_cosines as task_cosines
from subspace_jax.methods.regularized.orthoreg._analysis import update_grams as update_grams
from subspace_jax.methods.regularized.orthoreg._linearized import linearized as linearized
from subspace_jax.methods.regularized.orthoreg._penalty import low_rank_penalty as low_rank_penalty
from subspace_jax.methods.regularized.orthoreg._penalty import penalty as penalty

__all__ = [
    "disentanglement_error",
    "linearized",
    "low_rank_penalty",
    "penalty",
    "task_cosines",
    "update_grams",
]

register(
    __name__,
    title="Understanding and Enforcing Weight Disentanglement in Task Arithmetic",
    authors="Liu, Yin, Wang, Qi, Shi, Li, Gao, Tao",
    year=2026,
    kinds=("penalty", "analysis"),
    use_for="Experts whose task vectors are less alike, to be merged later.",
    not_for="Kernels are small: singular values of one are more than they need, and merging loses.",
    differs="The norm itself is the default, as in the released code; `squared=True` is the paper's equation.",
)
