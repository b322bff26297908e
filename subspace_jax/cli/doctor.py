"""`subspace-jax doctor`: versions, devices, memory, caches, and what is missing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util

import jax

import subspace_jax as sj
from subspace_jax.assets import cache_folder, expand, is_available
from subspace_jax.models import CARRIED

from ._console import console

NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "jaxtyping")
# Module, package, and what is not possible without it.
OPTIONAL = (
    ("jinja2", "jinja2", "chat templates"),
    ("tokenizers", "tokenizers", "text models"),
    ("pyarrow", "pyarrow", "Parquet files"),
    ("PIL", "pillow", "images"),
    ("matplotlib", "matplotlib", "pictures"),
    ("sklearn", "scikit-learn", "clustering"),
    ("peft", "peft", "loading adapters in PyTorch"),
    ("torch", "torch", "loading adapters in PyTorch"),
)


def run() -> None:
    """Show what this machine has, what is missing, and the line that mends it."""
    output = console()
    output.print(f"subspace_jax {sj.__version__}, Python {platform.python_version()} on {platform.platform()}")
    output.print(", ".join(f"{name} {metadata.version(name)}" for name in NEEDED))
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        output.print(f"device {device.id}: {device.device_kind} ({device.platform}){memory}")
    output.print(f"processors: {os.cpu_count()}, of which this process may use {_usable()}")
    cache = getattr(jax.config, "jax_compilation_cache_dir", None) or f"none; {CACHE}"
    output.print(f"compilation cache: {cache}", markup=False)
    output.print(f"allocator: {_allocator()}", markup=False)
    output.print(f"carried models in {cache_folder()}:")
    for name, (_, group) in CARRIED.items():
        there = all(is_available(asset.name) for asset in expand(group))
        output.print(f"  {name}: {'there' if there else 'not fetched yet'}")
    missing = [(package, use) for module, package, use in OPTIONAL if util.find_spec(module) is None]
    for package, use in missing:
        output.print(f"not installed: {package} ({use}): pip install {package}")
    if not missing:
        output.print("every optional package is installed")


# What keeps glibc from giving memory back, as `python -m benchmarks run peft_minilm` measures it.
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000:glibc.malloc.arena_max=1"

CACHE = "export JAX_COMPILATION_CACHE_DIR=~/.cache/jax keeps compiled programs between runs"


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocator() -> str:
    """On Linux glibc gives large arrays back to the system after every step and faults them in again."""
    if not sys.platform.startswith("linux"):
        return "the system's"
    if "GLIBC_TUNABLES" in os.environ:
        return f"glibc with GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}"
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ("tcmalloc", "jemalloc")):
        return os.environ["LD_PRELOAD"]
    return f"glibc's defaults; on a CPU steps may be faster with: export GLIBC_TUNABLES={KEEP_MEMORY}"
