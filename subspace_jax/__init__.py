"""Adapt pretrained JAX models: stand-in weights and subspace gradient transformations."""

from subspace_jax.adapters import Source as Source
from subspace_jax.adapters import at_rank as at_rank
from subspace_jax.adapters import catalogue as catalogue
from subspace_jax.adapters import dora as dora
from subspace_jax.adapters import keep_params_near_identity as keep_params_near_identity
from subspace_jax.adapters import loldu as loldu
from subspace_jax.adapters import lora as lora
from subspace_jax.adapters import lora_sb as lora_sb
from subspace_jax.adapters import lora_xs as lora_xs
from subspace_jax.adapters import matryoshka as matryoshka
from subspace_jax.adapters import oft as oft
from subspace_jax.adapters import pissa as pissa
from subspace_jax.adapters import qpissa as qpissa
from subspace_jax.adapters import sample_rank as sample_rank
from subspace_jax.adapters import scale_by_optimal_core as scale_by_optimal_core
from subspace_jax.adapters import svfit as svfit
from subspace_jax.adapters import to_lora as to_lora
from subspace_jax.adapters import truncate_rank as truncate_rank
from subspace_jax.core import Method as Method
from subspace_jax.core import Role as Role
from subspace_jax.core import Weight as Weight
from subspace_jax.core import adapt as adapt
from subspace_jax.core import capture as capture
from subspace_jax.core import combine as combine
from subspace_jax.core import full as full
from subspace_jax.core import is_weight as is_weight
from subspace_jax.core import merge as merge
from subspace_jax.core import merge_rounding as merge_rounding
from subspace_jax.core import partition as partition
from subspace_jax.core import resolve_links as resolve_links
from subspace_jax.core import roles as roles
from subspace_jax.core import summary as summary
from subspace_jax.core import with_adapters as with_adapters
from subspace_jax.core import with_dropout as with_dropout
from subspace_jax.io import Checkpointer as Checkpointer
from subspace_jax.io import latest_step as latest_step
from subspace_jax.io import load_adapter as load_adapter
from subspace_jax.io import restore_checkpoint as restore_checkpoint
from subspace_jax.io import save_adapter as save_adapter
from subspace_jax.io import save_checkpoint as save_checkpoint
from subspace_jax.metrics import aurac as aurac

__all__ = [
    "Checkpointer",
    "Method",
    "Role",
    "Source",
    "Weight",
    "adapt",
    "at_rank",
    "aurac",
    "capture",
    "catalogue",
    "combine",
    "dora",
    "full",
    "is_weight",
    "keep_params_near_identity",
    "latest_step",
    "load_adapter",
    "loldu",
    "lora",
    "lora_sb",
    "lora_xs",
    "matryoshka",
    "merge",
    "merge_rounding",
    "oft",
    "partition",
    "pissa",
    "qpissa",
    "resolve_links",
    "restore_checkpoint",
    "roles",
    "sample_rank",
    "save_adapter",
    "save_checkpoint",
    "scale_by_optimal_core",
    "summary",
    "svfit",
    "to_lora",
    "truncate_rank",
    "with_adapters",
    "with_dropout",
]
