"""Learning task after task without forgetting: what to remember of each, and what to keep free of it."""

from subspace_jax.continual._coso_learner import coso_learner as coso_learner
from subspace_jax.continual._gpm import GPMMemory as GPMMemory
from subspace_jax.continual._gpm import conv_patches as conv_patches
from subspace_jax.continual._gpm import gpm_memory as gpm_memory
from subspace_jax.continual._gpm import gpm_update as gpm_update
from subspace_jax.continual._gpm_learner import gpm_learner as gpm_learner
from subspace_jax.continual._learner import Learner as Learner
from subspace_jax.continual._learner import LearnerState as LearnerState
from subspace_jax.continual._learner import StreamError as StreamError
from subspace_jax.continual._o_lora import finish_task as finish_task
from subspace_jax.continual._o_lora import o_lora as o_lora
from subspace_jax.continual._o_lora import o_lora_penalty as o_lora_penalty
from subspace_jax.continual._o_lora_learner import o_lora_learner as o_lora_learner
from subspace_jax.continual._osf_learner import osf_learner as osf_learner
from subspace_jax.continual._scores import StreamScores as StreamScores
from subspace_jax.continual._scores import stream_scores as stream_scores
from subspace_jax.continual._sequential import joint as joint
from subspace_jax.continual._sequential import sequential as sequential
from subspace_jax.continual._stream import StreamCheckpointer as StreamCheckpointer
from subspace_jax.continual._stream import StreamResult as StreamResult
from subspace_jax.continual._stream import StreamTask as StreamTask
from subspace_jax.continual._stream import run_stream as run_stream

__all__ = [
    "GPMMemory",
    "Learner",
    "LearnerState",
    "StreamCheckpointer",
    "StreamError",
    "StreamResult",
    "StreamScores",
    "StreamTask",
    "conv_patches",
    "coso_learner",
    "finish_task",
    "gpm_learner",
    "gpm_memory",
    "gpm_update",
    "joint",
    "o_lora",
    "o_lora_learner",
    "o_lora_penalty",
    "osf_learner",
    "run_stream",
    "sequential",
    "stream_scores",
]
