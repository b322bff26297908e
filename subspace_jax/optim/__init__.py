"""Gradient transformations for optax that know subspaces and stand-in weights."""

from subspace_jax.optim._galore import galore as galore
from subspace_jax.optim._in_subspace import InSubspaceState as InSubspaceState
from subspace_jax.optim._in_subspace import in_complement as in_complement
from subspace_jax.optim._in_subspace import in_subspace as in_subspace
from subspace_jax.optim._matrices import Matrices as Matrices
from subspace_jax.optim._matrices import map_matrices as map_matrices
from subspace_jax.optim._matrices import views as views
from subspace_jax.optim._moments import project_momentum as project_momentum
from subspace_jax.optim._moments import reset_moments as reset_moments
from subspace_jax.optim._project import ProjectState as ProjectState
from subspace_jax.optim._project import project_orthogonal as project_orthogonal
from subspace_jax.optim._project import replace_basis as replace_basis
from subspace_jax.optim._project import sandwich as sandwich

__all__ = [
    "InSubspaceState",
    "Matrices",
    "ProjectState",
    "galore",
    "in_complement",
    "in_subspace",
    "map_matrices",
    "project_momentum",
    "project_orthogonal",
    "replace_basis",
    "reset_moments",
    "sandwich",
    "views",
]
