"""Low-rank adapters."""

from subspace_jax.methods.low_rank import block_lora as block_lora
from subspace_jax.methods.low_rank import comp_lora as comp_lora
from subspace_jax.methods.low_rank import corda as corda
from subspace_jax.methods.low_rank import dora as dora
from subspace_jax.methods.low_rank import loldu as loldu
from subspace_jax.methods.low_rank import lora as lora
from subspace_jax.methods.low_rank import lora_sb as lora_sb
from subspace_jax.methods.low_rank import lora_squeeze as lora_squeeze
from subspace_jax.methods.low_rank import matryoshka as matryoshka
from subspace_jax.methods.low_rank import orthogonal_adaptation as orthogonal_adaptation
from subspace_jax.methods.low_rank import pego as pego
from subspace_jax.methods.low_rank import pissa as pissa
from subspace_jax.methods.low_rank import qlora as qlora
from subspace_jax.methods.low_rank import queryable_lora as queryable_lora
from subspace_jax.methods.low_rank import svfit as svfit

__all__ = [
    "block_lora",
    "comp_lora",
    "corda",
    "dora",
    "loldu",
    "lora",
    "lora_sb",
    "lora_squeeze",
    "matryoshka",
    "orthogonal_adaptation",
    "pego",
    "pissa",
    "qlora",
    "queryable_lora",
    "svfit",
]
