"""Methods that learn task after task without forgetting."""

from subspace_jax.methods.continual import coso as coso
from subspace_jax.methods.continual import gpm as gpm
from subspace_jax.methods.continual import igsp as igsp
from subspace_jax.methods.continual import o_lora as o_lora
from subspace_jax.methods.continual import osf as osf

__all__ = [
    "coso",
    "gpm",
    "igsp",
    "o_lora",
    "osf",
]
