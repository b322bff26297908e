"""Adapters that train chosen entries, rows or columns."""

from subspace_jax.methods.sparse import composable_sft as composable_sft
from subspace_jax.methods.sparse import lift as lift
from subspace_jax.methods.sparse import mosa as mosa
from subspace_jax.methods.sparse import s2ft as s2ft
from subspace_jax.methods.sparse import sara as sara
from subspace_jax.methods.sparse import snell as snell
from subspace_jax.methods.sparse import snella as snella
from subspace_jax.methods.sparse import spt as spt

__all__ = [
    "composable_sft",
    "lift",
    "mosa",
    "s2ft",
    "sara",
    "snell",
    "snella",
    "spt",
]
