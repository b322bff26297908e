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
    use_for="A stream of tasks where an adapter for each is kept in one merged model.",
    not_for="Forgetting must be small: a penalty is softer than a projection, and GPM keeps more in our streams.",
    differs="The penalty acts on the side of the inputs, as the authors' code has it; the paper writes the other side.",
)
