"""Modules on activations, on any function: they stand where a block's kernels stand and add to what these give."""

from subspace_jax.modules._bottleneck import bottleneck as bottleneck
from subspace_jax.modules._module import Module as Module
from subspace_jax.modules._module_bank import ModuleBank as ModuleBank
from subspace_jax.modules._module_bank import alone as alone
from subspace_jax.modules._module_bank import with_slots as with_slots
from subspace_jax.modules._weights import ACTIVATIONS as ACTIVATIONS
from subspace_jax.modules._weights import Activation as Activation
from subspace_jax.modules._weights import Bottleneck as Bottleneck
from subspace_jax.modules._weights import KeptInput as KeptInput
from subspace_jax.modules._weights import features_last as features_last

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Bottleneck",
    "KeptInput",
    "Module",
    "ModuleBank",
    "alone",
    "bottleneck",
    "features_last",
    "with_slots",
]
