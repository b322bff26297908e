"""MoSA: splits an adapter into parts, trains a random one in each pass, and merges them."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.mosa._method import Share as Share
from subspace_jax.methods.sparse.mosa._method import Split as Split
from subspace_jax.methods.sparse.mosa._method import TwoPasses as TwoPasses
from subspace_jax.methods.sparse.mosa._method import consistency as consistency
from subspace_jax.methods.sparse.mosa._method import merge_parts as merge_parts
from subspace_jax.methods.sparse.mosa._method import mosa as mosa
from subspace_jax.methods.sparse.mosa._method import two_pass_loss as two_pass_loss
from subspace_jax.methods.sparse.mosa._weight import MixedAdapter as MixedAdapter

__all__ = [
    "MixedAdapter",
    "Share",
    "Split",
    "TwoPasses",
    "consistency",
    "merge_parts",
    "mosa",
    "two_pass_loss",
]

register(
    __name__,
    title="MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning",
    authors="Zhang, Zou, An, Liu, Zhang",
    year=2024,
    kinds=("module",),
    use_for="Adapters on some dozens of examples, where it is a point ahead, within a spread.",
    not_for="Data are plenty, or two passes a step are too dear.",
    differs=(
        "One array stands for the released N copies with masked gradients, the same under SGD and under Adam with "
        "one counter."
    ),
)
