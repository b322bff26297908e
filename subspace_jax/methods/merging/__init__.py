"""Published mergers: several experts of one base model become one. The usual ones are in `sj.merging`."""

from subspace_jax.methods.merging import capvector as capvector
from subspace_jax.methods.merging import concrete as concrete
from subspace_jax.methods.merging import do_merging as do_merging
from subspace_jax.methods.merging import orthomerge as orthomerge

__all__ = [
    "capvector",
    "concrete",
    "do_merging",
    "orthomerge",
]
