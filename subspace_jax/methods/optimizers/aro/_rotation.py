"""Orthogonal factors of square matrices, with signs that do not depend on the library."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from subspace_jax.linalg import wide_matmul

Factorization = Literal["householder", "cholesky"]

_SHIFT = 1e-6
_ORTHOGONAL = 1e-3


def orthogonal_factor(matrix: jax.Array, factorization: Factorization = "householder") -> jax.Array:
    """Returns the orthogonal factor of a QR factorization whose triangle has no negative diagonal entry.

    Args:
      matrix: `[*stack, m, m]`, whole on every device.
      factorization: "householder", or "cholesky": that of the Gram matrix, shifted, in two passes, which needs products
        and a triangular solve alone. Where it fails, on matrices of nearly lower rank, Householder's is taken.

    Returns:
      `[*stack, m, m]`, orthogonal for any matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonal_factor(jnp.diag(jnp.array([-2.0, 3.0]))).tolist()
      [[-1.0, 0.0], [0.0, 1.0]]
    """
    if factorization == "householder":
        return _householder(matrix)
    found = _cholesky(_cholesky(matrix))
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    error = jnp.abs(wide_matmul(jnp.swapaxes(found, -1, -2), found) - eye)
    # A comparison with NaN is false.
    return lax.cond(jnp.all(error < _ORTHOGONAL), lambda: found, lambda: _householder(matrix))


def _householder(matrix: jax.Array) -> jax.Array:
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]


def _cholesky(matrix: jax.Array) -> jax.Array:
    """One pass: with the Gram matrix L L^T, the factor is A L^-T."""
    gram = wide_matmul(jnp.swapaxes(matrix, -1, -2), matrix)
    size = matrix.shape[-1]
    shift = _SHIFT * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / size
    lower = jnp.linalg.cholesky(gram + shift * jnp.eye(size, dtype=gram.dtype), symmetrize_input=False)
    return jnp.swapaxes(solve_triangular(lower, jnp.swapaxes(matrix, -1, -2), lower=True), -1, -2)
