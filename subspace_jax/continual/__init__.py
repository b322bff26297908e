"""Learning task after task without forgetting: what to remember of each, and what to keep free of it."""

from subspace_jax.continual._gpm import GPMMemory as GPMMemory
from subspace_jax.continual._gpm import conv_patches as conv_patches
from subspace_jax.continual._gpm import gpm_memory as gpm_memory
from subspace_jax.continual._gpm import gpm_update as gpm_update
from subspace_jax.continual._o_lora import finish_task as finish_task
from subspace_jax.continual._o_lora import o_lora as o_lora
from subspace_jax.continual._o_lora import o_lora_penalty as o_lora_penalty

__all__ = [
    "GPMMemory",
    "conv_patches",
    "finish_task",
    "gpm_memory",
    "gpm_update",
    "o_lora",
    "o_lora_penalty",
]
