"""Published adapter methods, one file each."""

from subspace_jax.adapters._catalogue import Source as Source
from subspace_jax.adapters._catalogue import catalogue as catalogue
from subspace_jax.adapters._dora import dora as dora
from subspace_jax.adapters._loldu import loldu as loldu
from subspace_jax.adapters._lora import lora as lora
from subspace_jax.adapters._lora_sb import lora_sb as lora_sb
from subspace_jax.adapters._lora_sb import lora_xs as lora_xs
from subspace_jax.adapters._lora_sb import scale_by_optimal_core as scale_by_optimal_core
from subspace_jax.adapters._matryoshka import at_rank as at_rank
from subspace_jax.adapters._matryoshka import matryoshka as matryoshka
from subspace_jax.adapters._matryoshka import sample_rank as sample_rank
from subspace_jax.adapters._matryoshka import truncate_rank as truncate_rank
from subspace_jax.adapters._oft import keep_params_near_identity as keep_params_near_identity
from subspace_jax.adapters._oft import oft as oft
from subspace_jax.adapters._pissa import pissa as pissa
from subspace_jax.adapters._pissa import qpissa as qpissa
from subspace_jax.adapters._pissa import to_lora as to_lora
from subspace_jax.adapters._svfit import svfit as svfit

__all__ = [
    "Source",
    "at_rank",
    "catalogue",
    "dora",
    "keep_params_near_identity",
    "loldu",
    "lora",
    "lora_sb",
    "lora_xs",
    "matryoshka",
    "oft",
    "pissa",
    "qpissa",
    "sample_rank",
    "scale_by_optimal_core",
    "svfit",
    "to_lora",
    "truncate_rank",
]
