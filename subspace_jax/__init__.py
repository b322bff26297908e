"""Adapt pretrained JAX models: stand-in weights and subspace gradient transformations."""

from subspace_jax import training as training
from subspace_jax.adapters import Source as Source
from subspace_jax.adapters import activation_scores as activation_scores
from subspace_jax.adapters import active_values as active_values
from subspace_jax.adapters import at_rank as at_rank
from subspace_jax.adapters import catalogue as catalogue
from subspace_jax.adapters import channel_scores as channel_scores
from subspace_jax.adapters import corda as corda
from subspace_jax.adapters import cosine_values as cosine_values
from subspace_jax.adapters import damped_covariance as damped_covariance
from subspace_jax.adapters import dora as dora
from subspace_jax.adapters import fix_locations as fix_locations
from subspace_jax.adapters import flora as flora
from subspace_jax.adapters import flora_to_lora as flora_to_lora
from subspace_jax.adapters import fold_ssf as fold_ssf
from subspace_jax.adapters import keep_params_near_identity as keep_params_near_identity
from subspace_jax.adapters import lift as lift
from subspace_jax.adapters import loca as loca
from subspace_jax.adapters import loldu as loldu
from subspace_jax.adapters import lora as lora
from subspace_jax.adapters import lora_sb as lora_sb
from subspace_jax.adapters import lora_xs as lora_xs
from subspace_jax.adapters import matryoshka as matryoshka
from subspace_jax.adapters import oft as oft
from subspace_jax.adapters import osf as osf
from subspace_jax.adapters import osf_importance as osf_importance
from subspace_jax.adapters import osf_ranks as osf_ranks
from subspace_jax.adapters import osf_schedule as osf_schedule
from subspace_jax.adapters import pissa as pissa
from subspace_jax.adapters import qpissa as qpissa
from subspace_jax.adapters import randlora as randlora
from subspace_jax.adapters import s2ft as s2ft
from subspace_jax.adapters import sample_rank as sample_rank
from subspace_jax.adapters import scale_by_optimal_core as scale_by_optimal_core
from subspace_jax.adapters import soka as soka
from subspace_jax.adapters import ssf as ssf
from subspace_jax.adapters import svfit as svfit
from subspace_jax.adapters import to_kronecker as to_kronecker
from subspace_jax.adapters import to_lora as to_lora
from subspace_jax.adapters import truncate_rank as truncate_rank
from subspace_jax.continual import Learner as Learner
from subspace_jax.continual import StreamTask as StreamTask
from subspace_jax.continual import conv_patches as conv_patches
from subspace_jax.continual import coso_learner as coso_learner
from subspace_jax.continual import finish_task as finish_task
from subspace_jax.continual import gpm_learner as gpm_learner
from subspace_jax.continual import gpm_memory as gpm_memory
from subspace_jax.continual import gpm_update as gpm_update
from subspace_jax.continual import joint as joint
from subspace_jax.continual import o_lora as o_lora
from subspace_jax.continual import o_lora_learner as o_lora_learner
from subspace_jax.continual import o_lora_penalty as o_lora_penalty
from subspace_jax.continual import osf_learner as osf_learner
from subspace_jax.continual import run_stream as run_stream
from subspace_jax.continual import sequential as sequential
from subspace_jax.continual import stream_scores as stream_scores
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
from subspace_jax.io import load_peft as load_peft
from subspace_jax.io import restore_checkpoint as restore_checkpoint
from subspace_jax.io import save_adapter as save_adapter
from subspace_jax.io import save_checkpoint as save_checkpoint
from subspace_jax.io import save_peft as save_peft
from subspace_jax.manifolds import Grassmann as Grassmann
from subspace_jax.manifolds import Manifold as Manifold
from subspace_jax.manifolds import SpecialOrthogonal as SpecialOrthogonal
from subspace_jax.manifolds import Stiefel as Stiefel
from subspace_jax.metrics import aurac as aurac
from subspace_jax.optim import add_lambda_orthogonality as add_lambda_orthogonality
from subspace_jax.optim import alternating as alternating
from subspace_jax.optim import coso as coso
from subspace_jax.optim import coso_end_task as coso_end_task
from subspace_jax.optim import galore as galore
from subspace_jax.optim import grassmann_sgd as grassmann_sgd
from subspace_jax.optim import in_complement as in_complement
from subspace_jax.optim import in_subspace as in_subspace
from subspace_jax.optim import lift_adam as lift_adam
from subspace_jax.optim import normalize_terms as normalize_terms
from subspace_jax.optim import osf_next_task as osf_next_task
from subspace_jax.optim import osf_projection as osf_projection
from subspace_jax.optim import project_momentum as project_momentum
from subspace_jax.optim import project_orthogonal as project_orthogonal
from subspace_jax.optim import prune_terms as prune_terms
from subspace_jax.optim import refresh_due as refresh_due
from subspace_jax.optim import replace_basis as replace_basis
from subspace_jax.optim import reselect_principal as reselect_principal
from subspace_jax.optim import reset_moments as reset_moments
from subspace_jax.optim import riemannian as riemannian
from subspace_jax.optim import sandwich as sandwich
from subspace_jax.optim import scale_by_dct_adam as scale_by_dct_adam
from subspace_jax.optim import scale_by_lift_adam as scale_by_lift_adam
from subspace_jax.optim import scale_by_lora_pro as scale_by_lora_pro
from subspace_jax.optim import scale_by_lora_pro_adam as scale_by_lora_pro_adam
from subspace_jax.optim import scale_by_trion as scale_by_trion
from subspace_jax.regularizers import lambda_orthogonality as lambda_orthogonality
from subspace_jax.sharding import shardings as shardings
from subspace_jax.sharding import state_shardings as state_shardings
from subspace_jax.weights import Coupling as Coupling
from subspace_jax.weights import co_permute as co_permute
from subspace_jax.weights import coupled_order as coupled_order
from subspace_jax.weights import fuse_slices as fuse_slices
from subspace_jax.weights import select_units as select_units
from subspace_jax.weights import serve_slices as serve_slices
from subspace_jax.weights import switch_slices as switch_slices

__all__ = [
    "Checkpointer",
    "Coupling",
    "Grassmann",
    "Learner",
    "Manifold",
    "Method",
    "Role",
    "Source",
    "SpecialOrthogonal",
    "Stiefel",
    "StreamTask",
    "Weight",
    "activation_scores",
    "active_values",
    "adapt",
    "add_lambda_orthogonality",
    "alternating",
    "at_rank",
    "aurac",
    "capture",
    "catalogue",
    "channel_scores",
    "co_permute",
    "combine",
    "conv_patches",
    "corda",
    "cosine_values",
    "coso",
    "coso_end_task",
    "coso_learner",
    "coupled_order",
    "damped_covariance",
    "dora",
    "finish_task",
    "fix_locations",
    "flora",
    "flora_to_lora",
    "fold_ssf",
    "full",
    "fuse_slices",
    "galore",
    "gpm_learner",
    "gpm_memory",
    "gpm_update",
    "grassmann_sgd",
    "in_complement",
    "in_subspace",
    "is_weight",
    "joint",
    "keep_params_near_identity",
    "lambda_orthogonality",
    "latest_step",
    "lift",
    "lift_adam",
    "load_adapter",
    "load_peft",
    "loca",
    "loldu",
    "lora",
    "lora_sb",
    "lora_xs",
    "matryoshka",
    "merge",
    "merge_rounding",
    "normalize_terms",
    "o_lora",
    "o_lora_learner",
    "o_lora_penalty",
    "oft",
    "osf",
    "osf_importance",
    "osf_learner",
    "osf_next_task",
    "osf_projection",
    "osf_ranks",
    "osf_schedule",
    "partition",
    "pissa",
    "project_momentum",
    "project_orthogonal",
    "prune_terms",
    "qpissa",
    "randlora",
    "refresh_due",
    "replace_basis",
    "reselect_principal",
    "reset_moments",
    "resolve_links",
    "restore_checkpoint",
    "riemannian",
    "roles",
    "run_stream",
    "s2ft",
    "sample_rank",
    "sandwich",
    "save_adapter",
    "save_checkpoint",
    "save_peft",
    "scale_by_dct_adam",
    "scale_by_lift_adam",
    "scale_by_lora_pro",
    "scale_by_lora_pro_adam",
    "scale_by_optimal_core",
    "scale_by_trion",
    "select_units",
    "sequential",
    "serve_slices",
    "shardings",
    "soka",
    "ssf",
    "state_shardings",
    "stream_scores",
    "summary",
    "svfit",
    "switch_slices",
    "to_kronecker",
    "to_lora",
    "training",
    "truncate_rank",
    "with_adapters",
    "with_dropout",
]
