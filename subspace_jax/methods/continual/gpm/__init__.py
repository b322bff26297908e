"""GPM: keeps updates orthogonal to the inputs of earlier tasks."""

from subspace_jax.core import register
from subspace_jax.methods.continual.gpm._learner import learner as learner
from subspace_jax.methods.continual.gpm._memory import GPMMemory as GPMMemory
from subspace_jax.methods.continual.gpm._memory import conv_patches as conv_patches
from subspace_jax.methods.continual.gpm._memory import init_memory as init_memory
from subspace_jax.methods.continual.gpm._memory import next_task as next_task

__all__ = [
    "GPMMemory",
    "conv_patches",
    "init_memory",
    "learner",
    "next_task",
]

register(
    __name__,
    title="Gradient Projection Memory for Continual Learning",
    authors="Saha, Garg, Roy",
    year=2021,
    kinds=("learner",),
    uses=("project_orthogonal", "sandwich"),
    experiment="projected_gradients",
)
