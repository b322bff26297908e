"""O-LoRA: gives every task an adapter of its own, orthogonal to those of earlier tasks."""

from subspace_jax.core import register
from subspace_jax.methods.continual.o_lora._learner import learner as learner
from subspace_jax.methods.continual.o_lora._method import next_task as next_task
from subspace_jax.methods.continual.o_lora._method import o_lora as o_lora
from subspace_jax.methods.continual.o_lora._method import penalty as penalty

__all__ = [
    "learner",
    "next_task",
    "o_lora",
    "penalty",
]

register(
    __name__,
    title="Orthogonal Subspace Learning for Language Model Continual Learning",
    authors="Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui, Huang",
    year=2023,
    kinds=("weight", "penalty", "learner"),
    experiment="projected_gradients",
)
