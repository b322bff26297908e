"""DO-Merging: merges magnitudes and directions of LoRA updates apart, after making their factors orthogonal."""

from subspace_jax.core import register
from subspace_jax.methods.merging.do_merging._method import do_merging as do_merging
from subspace_jax.methods.merging.do_merging._orthogonalize import orthogonalize as orthogonalize
from subspace_jax.methods.merging.do_merging._orthogonalize import pair_loss as pair_loss

__all__ = [
    "do_merging",
    "orthogonalize",
    "pair_loss",
]

register(
    __name__,
    title="Decouple and Orthogonalize: A Data-Free Framework for LoRA Merging",
    authors="Zheng, Wang, Huang, Wang, Chen, Fan, Hu, Ye",
    year=2025,
    kinds=("merger",),
    use_for="Merging LoRA experts whose updates differ in size, when equal shares are wanted.",
    not_for="Experts need their size: in our test task arithmetic is ahead by 13 points.",
    differs=(
        "Lengths are those of outputs unless `granularity` says otherwise; a secondary source reads the paper as "
        "lengths of inputs."
    ),
)
