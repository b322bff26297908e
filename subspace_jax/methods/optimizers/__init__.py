"""Published optimizers: gradient transformations."""

from subspace_jax.methods.optimizers import aro as aro
from subspace_jax.methods.optimizers import dct_lowrank as dct_lowrank
from subspace_jax.methods.optimizers import frank_wolfe_dictionary as frank_wolfe_dictionary
from subspace_jax.methods.optimizers import galore as galore
from subspace_jax.methods.optimizers import lora_pro as lora_pro
from subspace_jax.methods.optimizers import root as root

__all__ = [
    "aro",
    "dct_lowrank",
    "frank_wolfe_dictionary",
    "galore",
    "lora_pro",
    "root",
]
