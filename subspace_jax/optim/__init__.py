"""Gradient transformations for optax that know subspaces and stand-in weights."""

from subspace_jax.optim._add_lambda_orthogonality import AddLambdaOrthogonalityState as AddLambdaOrthogonalityState
from subspace_jax.optim._add_lambda_orthogonality import add_lambda_orthogonality as add_lambda_orthogonality
from subspace_jax.optim._alternating import AlternatingState as AlternatingState
from subspace_jax.optim._alternating import alternating as alternating
from subspace_jax.optim._coso import CosoState as CosoState
from subspace_jax.optim._coso import coso as coso
from subspace_jax.optim._coso_end_task import coso_end_task as coso_end_task
from subspace_jax.optim._dct import DctAdamState as DctAdamState
from subspace_jax.optim._dct import scale_by_dct_adam as scale_by_dct_adam
from subspace_jax.optim._galore import galore as galore
from subspace_jax.optim._in_subspace import InSubspaceState as InSubspaceState
from subspace_jax.optim._in_subspace import in_complement as in_complement
from subspace_jax.optim._in_subspace import in_subspace as in_subspace
from subspace_jax.optim._kronecker_terms import normalize_terms as normalize_terms
from subspace_jax.optim._kronecker_terms import prune_terms as prune_terms
from subspace_jax.optim._lift_adam import EpsMode as EpsMode
from subspace_jax.optim._lift_adam import ScaleByLiftAdamState as ScaleByLiftAdamState
from subspace_jax.optim._lift_adam import lift_adam as lift_adam
from subspace_jax.optim._lift_adam import scale_by_lift_adam as scale_by_lift_adam
from subspace_jax.optim._lora_pro import Adjusted as Adjusted
from subspace_jax.optim._lora_pro import LoraProAdamState as LoraProAdamState
from subspace_jax.optim._lora_pro import Pair as Pair
from subspace_jax.optim._lora_pro import adjust_pair as adjust_pair
from subspace_jax.optim._lora_pro import equivalent_gradient as equivalent_gradient
from subspace_jax.optim._lora_pro import low_rank_pairs as low_rank_pairs
from subspace_jax.optim._lora_pro import plain_pair as plain_pair
from subspace_jax.optim._lora_pro import scale_by_lora_pro as scale_by_lora_pro
from subspace_jax.optim._lora_pro import scale_by_lora_pro_adam as scale_by_lora_pro_adam
from subspace_jax.optim._matrices import Matrices as Matrices
from subspace_jax.optim._matrices import map_matrices as map_matrices
from subspace_jax.optim._matrices import views as views
from subspace_jax.optim._moments import project_momentum as project_momentum
from subspace_jax.optim._moments import reset_moments as reset_moments
from subspace_jax.optim._osf import OSFState as OSFState
from subspace_jax.optim._osf import osf_next_task as osf_next_task
from subspace_jax.optim._osf import osf_projection as osf_projection
from subspace_jax.optim._project import ProjectState as ProjectState
from subspace_jax.optim._project import SandwichState as SandwichState
from subspace_jax.optim._project import project_orthogonal as project_orthogonal
from subspace_jax.optim._project import replace_basis as replace_basis
from subspace_jax.optim._project import sandwich as sandwich
from subspace_jax.optim._reselect import refresh_due as refresh_due
from subspace_jax.optim._reselect import reselect_principal as reselect_principal
from subspace_jax.optim._riemannian import RiemannianState as RiemannianState
from subspace_jax.optim._riemannian import grassmann_sgd as grassmann_sgd
from subspace_jax.optim._riemannian import riemannian as riemannian
from subspace_jax.optim._trion import TrionState as TrionState
from subspace_jax.optim._trion import scale_by_trion as scale_by_trion

__all__ = [
    "AddLambdaOrthogonalityState",
    "Adjusted",
    "AlternatingState",
    "CosoState",
    "DctAdamState",
    "EpsMode",
    "InSubspaceState",
    "LoraProAdamState",
    "Matrices",
    "OSFState",
    "Pair",
    "ProjectState",
    "RiemannianState",
    "SandwichState",
    "ScaleByLiftAdamState",
    "TrionState",
    "add_lambda_orthogonality",
    "adjust_pair",
    "alternating",
    "coso",
    "coso_end_task",
    "equivalent_gradient",
    "galore",
    "grassmann_sgd",
    "in_complement",
    "in_subspace",
    "lift_adam",
    "low_rank_pairs",
    "map_matrices",
    "normalize_terms",
    "osf_next_task",
    "osf_projection",
    "plain_pair",
    "project_momentum",
    "project_orthogonal",
    "prune_terms",
    "refresh_due",
    "replace_basis",
    "reselect_principal",
    "reset_moments",
    "riemannian",
    "sandwich",
    "scale_by_dct_adam",
    "scale_by_lift_adam",
    "scale_by_lora_pro",
    "scale_by_lora_pro_adam",
    "scale_by_trion",
    "views",
]
