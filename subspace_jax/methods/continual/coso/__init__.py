"""CoSO: low-rank Adam in subspaces of the gradients, orthogonal to sketches of earlier tasks."""

from subspace_jax.core import register
from subspace_jax.methods.continual.coso._learner import learner as learner
from subspace_jax.methods.continual.coso._memory import next_task as next_task
from subspace_jax.methods.continual.coso._transform import CosoState as CosoState
from subspace_jax.methods.continual.coso._transform import coso as coso
from subspace_jax.methods.continual.coso._transform import scale_by_coso as scale_by_coso

__all__ = [
    "CosoState",
    "coso",
    "learner",
    "next_task",
    "scale_by_coso",
]

register(
    __name__,
    title="Continuous Subspace Optimization for Continual Learning",
    authors="Cheng, Wan, Wu, Hou, Zhang",
    year=2025,
    kinds=("transformation", "learner"),
    use_for=(
        "A stream of tasks with plain kernels and the state of a low-rank optimizer, where no old data may be kept."
    ),
    not_for="Biases, norms or other leaves have to learn as well: they forget, since only kernels are protected.",
    differs=(
        '`side="in"`, `guard` and `rotate_moments` are of this library; the released code keeps moments as they '
        "are when the subspace changes."
    ),
)
