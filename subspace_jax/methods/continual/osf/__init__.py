"""OSF: freezes a weight's large singular directions and trains what is orthogonal to them."""

from subspace_jax.core import register
from subspace_jax.methods.continual.osf._frozen import Removers as Removers
from subspace_jax.methods.continual.osf._frozen import removers as removers
from subspace_jax.methods.continual.osf._learner import learner as learner
from subspace_jax.methods.continual.osf._method import osf as osf
from subspace_jax.methods.continual.osf._ranks import importance as importance
from subspace_jax.methods.continual.osf._ranks import ranks as ranks
from subspace_jax.methods.continual.osf._ranks import schedule as schedule
from subspace_jax.methods.continual.osf._transform import OSFState as OSFState
from subspace_jax.methods.continual.osf._transform import next_task as next_task
from subspace_jax.methods.continual.osf._transform import projection as projection

__all__ = [
    "OSFState",
    "Removers",
    "importance",
    "learner",
    "next_task",
    "osf",
    "projection",
    "ranks",
    "removers",
    "schedule",
]

register(
    __name__,
    title="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
    authors="Nayak et al.",
    year=2025,
    kinds=("weight", "transformation", "learner"),
    use_for=(
        "A stream of tasks trained with nearly all of a model's capacity, or tuning that keeps the large "
        "directions of the weights."
    ),
    not_for=(
        "Memory or time is short: factors are kept in float32, and batches of few rows pay for forming the weight and "
        "projecting its factors. A step of the learner has 1.6 to 2.3 times the operations of full fine-tuning with "
        "1,024 rows at width 512, 4 to 8 times with 128; its `width` and `project_gradients` choose."
    ),
    differs=(
        "The defaults of the policy by importance are recalled from the paper; a public variant has others, see "
        "`sj.methods.osf.ranks`."
    ),
)
