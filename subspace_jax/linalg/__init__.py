"""Numerical linear algebra that adapters, optimisers and merging share."""

from subspace_jax.linalg._orthogonal import cayley as cayley
from subspace_jax.linalg._orthogonal import cayley_neumann as cayley_neumann
from subspace_jax.linalg._orthogonal import skew as skew
from subspace_jax.linalg._orthogonal import skew_size as skew_size
from subspace_jax.linalg._sharding import whole_matrices as whole_matrices
from subspace_jax.linalg._svd import SVD as SVD
from subspace_jax.linalg._svd import fix_signs as fix_signs
from subspace_jax.linalg._svd import randomized_svd as randomized_svd
from subspace_jax.linalg._svd import truncated_svd as truncated_svd
from subspace_jax.linalg._svd import wide_dtype as wide_dtype

__all__ = [
    "SVD",
    "cayley",
    "cayley_neumann",
    "fix_signs",
    "randomized_svd",
    "skew",
    "skew_size",
    "truncated_svd",
    "wide_dtype",
]
