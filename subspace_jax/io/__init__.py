"""Saving and loading: checkpoints of runs, adapters alone in a file, PEFT's folders, and manifests of trees."""

from subspace_jax.io._atomic import replacing as replacing
from subspace_jax.io._describe import describe as describe
from subspace_jax.io._errors import AdapterFileError as AdapterFileError
from subspace_jax.io._errors import CheckpointError as CheckpointError
from subspace_jax.io._errors import ManifestError as ManifestError
from subspace_jax.io._export import register_for_export as register_for_export
from subspace_jax.io._export import register_library_for_export as register_library_for_export
from subspace_jax.io._rebuild import rebuild as rebuild
from subspace_jax.io._safetensors import read_safetensors as read_safetensors
from subspace_jax.io._safetensors import write_safetensors as write_safetensors
from subspace_jax.io._tensor_files import TensorFiles as TensorFiles
from subspace_jax.io.adapter import load_adapter as load_adapter
from subspace_jax.io.adapter import save_adapter as save_adapter
from subspace_jax.io.checkpoint import Checkpoint as Checkpoint
from subspace_jax.io.checkpoint import Checkpointer as Checkpointer
from subspace_jax.io.checkpoint import abstract_checkpoint as abstract_checkpoint
from subspace_jax.io.checkpoint import latest_step as latest_step
from subspace_jax.io.checkpoint import restore_checkpoint as restore_checkpoint
from subspace_jax.io.checkpoint import save_checkpoint as save_checkpoint
from subspace_jax.io.peft import NameMap as NameMap
from subspace_jax.io.peft import NameRule as NameRule
from subspace_jax.io.peft import bert_names as bert_names
from subspace_jax.io.peft import clip_names as clip_names
from subspace_jax.io.peft import dinov2_names as dinov2_names
from subspace_jax.io.peft import export_tensors as export_tensors
from subspace_jax.io.peft import import_tensors as import_tensors
from subspace_jax.io.peft import llama_names as llama_names
from subspace_jax.io.peft import load_peft as load_peft
from subspace_jax.io.peft import save_peft as save_peft
from subspace_jax.io.peft import vit_names as vit_names

__all__ = [
    "AdapterFileError",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "ManifestError",
    "NameMap",
    "NameRule",
    "TensorFiles",
    "abstract_checkpoint",
    "bert_names",
    "clip_names",
    "describe",
    "dinov2_names",
    "export_tensors",
    "import_tensors",
    "latest_step",
    "llama_names",
    "load_adapter",
    "load_peft",
    "read_safetensors",
    "rebuild",
    "register_for_export",
    "register_library_for_export",
    "replacing",
    "restore_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "save_peft",
    "vit_names",
    "write_safetensors",
]
