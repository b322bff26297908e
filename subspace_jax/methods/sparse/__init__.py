"""Adapters that train chosen entries, rows or columns."""

from subspace_jax.methods.sparse import lift as lift
from subspace_jax.methods.sparse import s2ft as s2ft

__all__ = [
    "lift",
    "s2ft",
]
