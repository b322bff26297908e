"""Queryable LoRA: assembles the middle of LoRA for every row from a shared memory of atoms."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.queryable_lora._freeze import FrozenRouting as FrozenRouting
from subspace_jax.methods.low_rank.queryable_lora._freeze import balance as balance
from subspace_jax.methods.low_rank.queryable_lora._freeze import freeze_routing as freeze_routing
from subspace_jax.methods.low_rank.queryable_lora._method import queryable_lora as queryable_lora
from subspace_jax.methods.low_rank.queryable_lora._method import with_instruction as with_instruction
from subspace_jax.methods.low_rank.queryable_lora._routing import Router as Router
from subspace_jax.methods.low_rank.queryable_lora._routing import layer_norm as layer_norm
from subspace_jax.methods.low_rank.queryable_lora._routing import route as route
from subspace_jax.methods.low_rank.queryable_lora._routing import sparse_softmax as sparse_softmax
from subspace_jax.methods.low_rank.queryable_lora._weight import QueryableLowRank as QueryableLowRank

__all__ = [
    "FrozenRouting",
    "QueryableLowRank",
    "Router",
    "balance",
    "freeze_routing",
    "layer_norm",
    "queryable_lora",
    "route",
    "sparse_softmax",
    "with_instruction",
]

register(
    __name__,
    title="Queryable LoRA: Instruction-Regularized Routing Over Shared Low-Rank Update Atoms",
    authors="Vaidya, Jerzak, Ho, Bajaj",
    year=2026,
    kinds=("module",),
    use_for="Updates that depend on the input, such as an operator that the input names.",
    not_for="Plain fine-tuning: at equal size LoRA is ahead, and the result cannot be merged.",
    differs="The paper's formulas could not be read: what its abstract leaves open is this library's design.",
)
