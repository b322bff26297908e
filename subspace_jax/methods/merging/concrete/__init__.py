"""Concrete: learns, on inputs without labels, which entries of all task vectors to add, and how much of each vector."""

from subspace_jax.core import register
from subspace_jax.methods.merging.concrete._mask import add_masked as add_masked
from subspace_jax.methods.merging.concrete._mask import concrete_mask as concrete_mask
from subspace_jax.methods.merging.concrete._mask import init_logits as init_logits
from subspace_jax.methods.merging.concrete._mask import sample_mask as sample_mask
from subspace_jax.methods.merging.concrete._train import Concrete as Concrete
from subspace_jax.methods.merging.concrete._train import ada_merging as ada_merging
from subspace_jax.methods.merging.concrete._train import concrete_ada_merging as concrete_ada_merging
from subspace_jax.methods.merging.concrete._train import concrete_task_arithmetic as concrete_task_arithmetic
from subspace_jax.methods.merging.concrete._train import entropy_loss as entropy_loss
from subspace_jax.methods.merging.concrete._vectors import task_vectors as task_vectors

__all__ = [
    "Concrete",
    "ada_merging",
    "add_masked",
    "concrete_ada_merging",
    "concrete_mask",
    "concrete_task_arithmetic",
    "entropy_loss",
    "init_logits",
    "sample_mask",
    "task_vectors",
]

register(
    __name__,
    title="Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion",
    authors="Tang, Shen, Luo, Ding, Hu, Du, Tao",
    year=2023,
    kinds=("system",),
    use_for="Merging experts of different tasks with some inputs, but without labels.",
    not_for="There are no inputs at all: use `sj.merging.ties` or task arithmetic.",
)
