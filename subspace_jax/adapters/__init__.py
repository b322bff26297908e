"""Published adapter methods, one file each."""

from subspace_jax.adapters._catalogue import Source as Source
from subspace_jax.adapters._catalogue import catalogue as catalogue
from subspace_jax.adapters._lora import lora as lora
