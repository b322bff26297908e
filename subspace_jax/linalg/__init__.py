"""Numerical linear algebra that adapters, optimisers and merging share."""

from subspace_jax.linalg._svd import SVD as SVD
from subspace_jax.linalg._svd import fix_signs as fix_signs
from subspace_jax.linalg._svd import randomized_svd as randomized_svd
from subspace_jax.linalg._svd import truncated_svd as truncated_svd
from subspace_jax.linalg._svd import wide_dtype as wide_dtype

__all__ = ["SVD", "fix_signs", "randomized_svd", "truncated_svd", "wide_dtype"]
