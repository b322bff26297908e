"""Banks of adapters: one model in memory, and a batch whose rows use different adapters."""

from subspace_jax.banks._bank import bank as bank
from subspace_jax.banks._bank import pad_rank as pad_rank
from subspace_jax.banks._per_row import per_row as per_row
from subspace_jax.banks._slots import put as put
from subspace_jax.banks._slots import remove as remove
from subspace_jax.banks._slots import take as take

__all__ = [
    "bank",
    "pad_rank",
    "per_row",
    "put",
    "remove",
    "take",
]
