"""Polar factors: the nearest matrix with orthonormal rows or columns."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.linalg._newton_schulz import newton_schulz
from subspace_jax.linalg._sharding import whole_matrices
from subspace_jax.linalg._subspace import wide_matmul

PolarMethod = Literal["svd", "newton_schulz"]

# Coefficients that converge: to all digits for singular values above 1e-4 of the norm.
_CONVERGENT = ((1.5, -0.5, 0.0),) * 40


def polar(matrix: Float[Array, "*stack m n"], method: PolarMethod = "svd") -> Float[Array, "*stack m n"]:
    r"""Returns the orthogonal polar factor \(U V^T\) of a matrix, of its thin SVD \(U S V^T\).

    Of all matrices of spectral norm 1 it is the one with the largest inner product with the matrix.

    Args:
      matrix: `[*stack, m, n]`.
      method: "svd", exact, with some orthonormal vectors where singular values are zero; or "newton_schulz", by
        products alone, with zeros there.

    Returns:
      `[*stack, m, n]`, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> polar(jnp.diag(jnp.array([3.0, -2.0]))).round(6).tolist()
      [[1.0, 0.0], [0.0, -1.0]]
    """
    if method == "newton_schulz":
        return newton_schulz(matrix, _CONVERGENT)
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    u, _, vt = jnp.linalg.svd(whole_matrices(wide), full_matrices=False)
    return wide_matmul(u, vt)
