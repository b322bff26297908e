"""Published adapter methods, one file each."""

from subspace_jax.adapters._catalogue import Source as Source
from subspace_jax.adapters._catalogue import catalogue as catalogue
from subspace_jax.adapters._corda import corda as corda
from subspace_jax.adapters._corda import damped_covariance as damped_covariance
from subspace_jax.adapters._dora import dora as dora
from subspace_jax.adapters._flora import flora as flora
from subspace_jax.adapters._flora import flora_to_lora as flora_to_lora
from subspace_jax.adapters._lift import lift as lift
from subspace_jax.adapters._loca import cosine_values as cosine_values
from subspace_jax.adapters._loca import fix_locations as fix_locations
from subspace_jax.adapters._loca import loca as loca
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
from subspace_jax.adapters._osf import osf as osf
from subspace_jax.adapters._osf import osf_ranks as osf_ranks
from subspace_jax.adapters._osf import osf_schedule as osf_schedule
from subspace_jax.adapters._osf_importance import osf_importance as osf_importance
from subspace_jax.adapters._pissa import pissa as pissa
from subspace_jax.adapters._pissa import qpissa as qpissa
from subspace_jax.adapters._pissa import to_lora as to_lora
from subspace_jax.adapters._randlora import randlora as randlora
from subspace_jax.adapters._s2ft import activation_scores as activation_scores
from subspace_jax.adapters._s2ft import channel_scores as channel_scores
from subspace_jax.adapters._s2ft import s2ft as s2ft
from subspace_jax.adapters._soka import soka as soka
from subspace_jax.adapters._soka_terms import active_values as active_values
from subspace_jax.adapters._soka_terms import to_kronecker as to_kronecker
from subspace_jax.adapters._ssf import fold_ssf as fold_ssf
from subspace_jax.adapters._ssf import ssf as ssf
from subspace_jax.adapters._svfit import svfit as svfit

__all__ = [
    "Source",
    "activation_scores",
    "active_values",
    "at_rank",
    "catalogue",
    "channel_scores",
    "corda",
    "cosine_values",
    "damped_covariance",
    "dora",
    "fix_locations",
    "flora",
    "flora_to_lora",
    "fold_ssf",
    "keep_params_near_identity",
    "lift",
    "loca",
    "loldu",
    "lora",
    "lora_sb",
    "lora_xs",
    "matryoshka",
    "oft",
    "osf",
    "osf_importance",
    "osf_ranks",
    "osf_schedule",
    "pissa",
    "qpissa",
    "randlora",
    "s2ft",
    "sample_rank",
    "scale_by_optimal_core",
    "soka",
    "ssf",
    "svfit",
    "to_kronecker",
    "to_lora",
    "truncate_rank",
]
