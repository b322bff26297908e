"""Adapters alone in one safetensors file, without the parameters they stand on."""

from subspace_jax.io.adapter._file import load_adapter as load_adapter
from subspace_jax.io.adapter._file import save_adapter as save_adapter

__all__ = ["load_adapter", "save_adapter"]
