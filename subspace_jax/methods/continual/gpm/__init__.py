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
    use_for="A stream of tasks that are told apart, with full kernels learning and little forgetting.",
    not_for="Tasks are many and wide: the memory of input directions fills up, and then nothing can learn.",
    differs=(
        "Gradient and update are both projected, so that Adam keeps what plain SGD keeps; the released code "
        "leaves out one vector at the first task, which `official_off_by_one` repeats."
    ),
)
