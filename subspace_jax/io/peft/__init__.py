"""Folders of PyTorch's PEFT, one form of adapter a file: `_lora`, `_dora`, `_oft`, `_randlora`, `_full`."""

from subspace_jax.io.peft._backbones import bert_names as bert_names
from subspace_jax.io.peft._backbones import clip_names as clip_names
from subspace_jax.io.peft._backbones import dinov2_names as dinov2_names
from subspace_jax.io.peft._backbones import llama_names as llama_names
from subspace_jax.io.peft._backbones import vit_names as vit_names
from subspace_jax.io.peft._folder import load_peft as load_peft
from subspace_jax.io.peft._folder import save_peft as save_peft
from subspace_jax.io.peft._names import NameMap as NameMap
from subspace_jax.io.peft._names import NameRule as NameRule
from subspace_jax.io.peft._whole import export_tensors as export_tensors
from subspace_jax.io.peft._whole import import_tensors as import_tensors

__all__ = [
    "NameMap",
    "NameRule",
    "bert_names",
    "clip_names",
    "dinov2_names",
    "export_tensors",
    "import_tensors",
    "llama_names",
    "load_peft",
    "save_peft",
    "vit_names",
]
