"""Matrix manifolds that parameters can be kept on: Stiefel, Grassmann, rotations."""

from subspace_jax.manifolds._grassmann import Grassmann as Grassmann
from subspace_jax.manifolds._manifold import Manifold as Manifold
from subspace_jax.manifolds._manifold import Retraction as Retraction
from subspace_jax.manifolds._rotations import SpecialOrthogonal as SpecialOrthogonal
from subspace_jax.manifolds._stiefel import Stiefel as Stiefel

__all__ = [
    "Grassmann",
    "Manifold",
    "Retraction",
    "SpecialOrthogonal",
    "Stiefel",
]
