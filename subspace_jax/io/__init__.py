"""Saving and loading: checkpoints of whole runs, adapters alone in a file, and the manifest that describes both."""

from subspace_jax.io._adapter_file import load_adapter as load_adapter
from subspace_jax.io._adapter_file import save_adapter as save_adapter
from subspace_jax.io._atomic import replacing as replacing
from subspace_jax.io._checkpoint import abstract_checkpoint as abstract_checkpoint
from subspace_jax.io._checkpoint import latest_step as latest_step
from subspace_jax.io._checkpoint import restore_checkpoint as restore_checkpoint
from subspace_jax.io._checkpoint import save_checkpoint as save_checkpoint
from subspace_jax.io._checkpointer import Checkpointer as Checkpointer
from subspace_jax.io._describe import describe as describe
from subspace_jax.io._errors import AdapterFileError as AdapterFileError
from subspace_jax.io._errors import CheckpointError as CheckpointError
from subspace_jax.io._errors import ManifestError as ManifestError
from subspace_jax.io._rebuild import rebuild as rebuild
from subspace_jax.io._safetensors import read_safetensors as read_safetensors
from subspace_jax.io._safetensors import write_safetensors as write_safetensors
from subspace_jax.io._state import Checkpoint as Checkpoint

__all__ = [
    "AdapterFileError",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "ManifestError",
    "abstract_checkpoint",
    "describe",
    "latest_step",
    "load_adapter",
    "read_safetensors",
    "rebuild",
    "replacing",
    "restore_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "write_safetensors",
]
