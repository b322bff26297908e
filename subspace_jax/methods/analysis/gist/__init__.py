"""GIST: selects training examples whose gradients point where those of a target's validation set do."""

from subspace_jax.core import register
from subspace_jax.methods.analysis.gist._scores import Scores as Scores
from subspace_jax.methods.analysis.gist._scores import score_examples as score_examples
from subspace_jax.methods.analysis.gist._scores import select_examples as select_examples
from subspace_jax.methods.analysis.gist._scores import total_scores as total_scores
from subspace_jax.methods.analysis.gist._subspace import TargetSubspace as TargetSubspace
from subspace_jax.methods.analysis.gist._subspace import example_gradients as example_gradients
from subspace_jax.methods.analysis.gist._subspace import fit_subspace as fit_subspace

__all__ = [
    "Scores",
    "TargetSubspace",
    "example_gradients",
    "fit_subspace",
    "score_examples",
    "select_examples",
    "total_scores",
]

register(
    __name__,
    title="GIST: Targeted Data Selection for Instruction Tuning via Coupled Optimization Geometry",
    authors="Min, Huang, Wan, Chen",
    year=2026,
    kinds=("analysis",),
    use_for=(
        "Choosing, out of a large pool, the training examples whose gradients help a target for which you have a "
        "small validation set."
    ),
    not_for="There is no validation set of the target, or one pass of gradients over the whole pool is too dear.",
    differs='`aggregate` follows the released code (a mean for each subtask); "example" is the paper\'s text.',
)
