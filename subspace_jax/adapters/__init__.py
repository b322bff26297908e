"""Published adapter methods, one file each."""

from subspace_jax.adapters._catalogue import Source as Source
from subspace_jax.adapters._catalogue import catalogue as catalogue
from subspace_jax.adapters._dora import dora as dora
from subspace_jax.adapters._lora import lora as lora
from subspace_jax.adapters._pissa import pissa as pissa
from subspace_jax.adapters._pissa import qpissa as qpissa
from subspace_jax.adapters._pissa import to_lora as to_lora

__all__ = ["Source", "catalogue", "dora", "lora", "pissa", "qpissa", "to_lora"]
