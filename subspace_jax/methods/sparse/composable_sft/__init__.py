"""Composable sparse fine-tuning: lottery-ticket vectors of tasks and languages that add up in one model."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.composable_sft._method import Ticket as Ticket
from subspace_jax.methods.sparse.composable_sft._method import composable_sft as composable_sft
from subspace_jax.methods.sparse.composable_sft._method import distance as distance
from subspace_jax.methods.sparse.composable_sft._method import lottery_ticket as lottery_ticket
from subspace_jax.methods.sparse.composable_sft._selection import Selection as Selection
from subspace_jax.methods.sparse.composable_sft._selection import select_changed as select_changed
from subspace_jax.methods.sparse.composable_sft._selection import select_random as select_random
from subspace_jax.methods.sparse.composable_sft._vector import Vector as Vector
from subspace_jax.methods.sparse.composable_sft._vector import compose as compose
from subspace_jax.methods.sparse.composable_sft._vector import decode_gaps as decode_gaps
from subspace_jax.methods.sparse.composable_sft._vector import encode_gaps as encode_gaps
from subspace_jax.methods.sparse.composable_sft._vector import vector_of as vector_of

__all__ = [
    "Selection",
    "Ticket",
    "Vector",
    "composable_sft",
    "compose",
    "decode_gaps",
    "distance",
    "encode_gaps",
    "lottery_ticket",
    "select_changed",
    "select_random",
    "vector_of",
]

register(
    __name__,
    title="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    authors="Ansell, Ponti, Korhonen, Vulic",
    year=2022,
    kinds=("weight", "penalty"),
    use_for="Task and language (or domain) learned apart and added up.",
    not_for="One task alone: sparse is not better than dense here.",
)
