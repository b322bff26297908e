"""Gradient transformations for optax that know subspaces and stand-in weights."""

from subspace_jax.optim._holes import Leaves as Leaves
from subspace_jax.optim._holes import filled as filled
from subspace_jax.optim._holes import is_hole as is_hole
from subspace_jax.optim._holes import like_updates as like_updates
from subspace_jax.optim._holes import rest_without_gradient as rest_without_gradient
from subspace_jax.optim._in_subspace import Decomposition as Decomposition
from subspace_jax.optim._in_subspace import InSubspaceState as InSubspaceState
from subspace_jax.optim._in_subspace import in_complement as in_complement
from subspace_jax.optim._in_subspace import in_subspace as in_subspace
from subspace_jax.optim._matrix_views import MatrixView as MatrixView
from subspace_jax.optim._matrix_views import check_paths as check_paths
from subspace_jax.optim._matrix_views import map_matrices as map_matrices
from subspace_jax.optim._matrix_views import matrix_views as matrix_views
from subspace_jax.optim._matrix_views import refuse_unseen as refuse_unseen
from subspace_jax.optim._moments import FIRST_MOMENTS as FIRST_MOMENTS
from subspace_jax.optim._moments import SECOND_MOMENTS as SECOND_MOMENTS
from subspace_jax.optim._moments import map_moments as map_moments
from subspace_jax.optim._moments import project_momentum as project_momentum
from subspace_jax.optim._moments import reset_moments as reset_moments
from subspace_jax.optim._project import ProjectState as ProjectState
from subspace_jax.optim._project import SandwichState as SandwichState
from subspace_jax.optim._project import project_orthogonal as project_orthogonal
from subspace_jax.optim._project import replace_basis as replace_basis
from subspace_jax.optim._project import sandwich as sandwich
from subspace_jax.optim._rates import is_zero as is_zero
from subspace_jax.optim._rates import with_rate as with_rate
from subspace_jax.optim._remove import RemoveState as RemoveState
from subspace_jax.optim._remove import remove_subspaces as remove_subspaces
from subspace_jax.optim._riemannian import RiemannianState as RiemannianState
from subspace_jax.optim._riemannian import riemannian as riemannian
from subspace_jax.optim._rounding import without_rounding as without_rounding
from subspace_jax.optim._scale_matrices import MatricesState as MatricesState
from subspace_jax.optim._scale_matrices import MatrixStep as MatrixStep
from subspace_jax.optim._scale_matrices import Parts as Parts
from subspace_jax.optim._scale_matrices import adam_direction as adam_direction
from subspace_jax.optim._scale_matrices import scale_matrices as scale_matrices
from subspace_jax.optim._subspace_map import Moments as Moments
from subspace_jax.optim._subspace_map import SideRule as SideRule
from subspace_jax.optim._subspace_map import SubspaceMap as SubspaceMap
from subspace_jax.optim._subspace_map import matrix_shape as matrix_shape
from subspace_jax.optim._subspace_map import subspace_map as subspace_map

__all__ = [
    "FIRST_MOMENTS",
    "SECOND_MOMENTS",
    "Decomposition",
    "InSubspaceState",
    "Leaves",
    "MatricesState",
    "MatrixStep",
    "MatrixView",
    "Moments",
    "Parts",
    "ProjectState",
    "RemoveState",
    "RiemannianState",
    "SandwichState",
    "SideRule",
    "SubspaceMap",
    "adam_direction",
    "check_paths",
    "filled",
    "in_complement",
    "in_subspace",
    "is_hole",
    "is_zero",
    "like_updates",
    "map_matrices",
    "map_moments",
    "matrix_shape",
    "matrix_views",
    "project_momentum",
    "project_orthogonal",
    "refuse_unseen",
    "remove_subspaces",
    "replace_basis",
    "reset_moments",
    "rest_without_gradient",
    "riemannian",
    "sandwich",
    "scale_matrices",
    "subspace_map",
    "with_rate",
    "without_rounding",
]
