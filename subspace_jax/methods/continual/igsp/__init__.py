"""iGSP: a shared pool of small experts that grows only by what a task's routers show the old ones not to cover."""

from subspace_jax.core import register
from subspace_jax.methods.continual.igsp._learner import learner as learner
from subspace_jax.methods.continual.igsp._method import igsp as igsp
from subspace_jax.methods.continual.igsp._pool import PoolMemory as PoolMemory
from subspace_jax.methods.continual.igsp._routing import price_at as price_at
from subspace_jax.methods.continual.igsp._routing import probabilities as probabilities
from subspace_jax.methods.continual.igsp._routing import prune as prune
from subspace_jax.methods.continual.igsp._routing import subspace_penalty as subspace_penalty
from subspace_jax.methods.continual.igsp._selector import TaskSelector as TaskSelector
from subspace_jax.methods.continual.igsp._selector import add_task as add_task
from subspace_jax.methods.continual.igsp._selector import init_selector as init_selector
from subspace_jax.methods.continual.igsp._selector import select_task as select_task
from subspace_jax.methods.continual.igsp._trees import at_task as at_task
from subspace_jax.methods.continual.igsp._trees import compact as compact
from subspace_jax.methods.continual.igsp._trees import kept_experts as kept_experts
from subspace_jax.methods.continual.igsp._trees import stored_values as stored_values
from subspace_jax.methods.continual.igsp._weight import ExpertPool as ExpertPool

__all__ = [
    "ExpertPool",
    "PoolMemory",
    "TaskSelector",
    "add_task",
    "at_task",
    "compact",
    "igsp",
    "init_selector",
    "kept_experts",
    "learner",
    "price_at",
    "probabilities",
    "prune",
    "select_task",
    "stored_values",
    "subspace_penalty",
]

register(
    __name__,
    title="iGSP: Implicit Gradient Subspace Projection for Efficient Continual Learning of Vision-Language Models",
    authors="Cui et al.",
    year=2026,
    kinds=("module", "learner"),
    use_for="A stream of tasks that partly resemble each other, with exact outputs for old tasks.",
    not_for="The task of an input cannot be told or guessed: a router has to be chosen for it.",
    differs="Experts read a block's input after the norm, where the host's code takes the stream before it.",
)
