"""Checkpoints of training runs: Orbax writes the arrays, a manifest beside them describes the tree."""

from subspace_jax.io.checkpoint._checkpointer import Checkpointer as Checkpointer
from subspace_jax.io.checkpoint._save import abstract_checkpoint as abstract_checkpoint
from subspace_jax.io.checkpoint._save import latest_step as latest_step
from subspace_jax.io.checkpoint._save import restore_checkpoint as restore_checkpoint
from subspace_jax.io.checkpoint._save import save_checkpoint as save_checkpoint
from subspace_jax.io.checkpoint._state import Checkpoint as Checkpoint

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "abstract_checkpoint",
    "latest_step",
    "restore_checkpoint",
    "save_checkpoint",
]
