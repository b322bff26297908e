"""Numerics of matrices with orthonormal columns, which the manifolds share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.linalg import expm

from subspace_jax.linalg import by_compiler, whole_matrices, wide_dtype, wide_matmul


def widened(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays in at least float32, with matrices whole on every device."""
    return tuple(whole_matrices(jnp.asarray(v).astype(wide_dtype(jnp.asarray(v).dtype))) for v in arrays)


def transposed(matrix: jax.Array) -> jax.Array:
    """Returns the transposed matrices of a stack."""
    return jnp.swapaxes(matrix, -1, -2)


def product(*matrices: jax.Array) -> jax.Array:
    """Returns a product of whole stacked matrices, from left to right, in full precision."""
    left, *rest = matrices
    for right in rest:
        left = wide_matmul(left, right)
    return left


def gram(left: jax.Array, right: jax.Array) -> jax.Array:
    r"""Returns \(A^T B\), `[*stack, k, m]`."""
    return product(transposed(left), right)


def exponential(matrix: jax.Array) -> jax.Array:
    """Returns the matrix exponential of whole stacked matrices, also where the stack is split."""
    return by_compiler(expm, matrix)


def symmetric(matrix: jax.Array) -> jax.Array:
    """Returns the symmetric part."""
    return (matrix + transposed(matrix)) / 2


def skew_part(matrix: jax.Array) -> jax.Array:
    """Returns the skew-symmetric part."""
    return (matrix - transposed(matrix)) / 2


def qr_frame(matrix: jax.Array) -> jax.Array:
    r"""Returns the orthonormal factor of \(A = Q R\) for the \(R\) whose diagonal is positive.

    Without the rule for signs LAPACK may flip a column, against which a stored momentum would then run.
    """
    return by_compiler(_qr_frame, matrix)


def _qr_frame(matrix: jax.Array) -> jax.Array:
    q, r = jnp.linalg.qr(matrix)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1.0, 1.0).astype(q.dtype)[..., None, :]


def polar_frame(matrix: jax.Array) -> jax.Array:
    r"""Returns \(U V^T\) of the thin SVD: the nearest matrix with orthonormal columns."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return product(u, vt)


def frobenius(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Returns \(\langle A, B \rangle\), the sum of products of entries of each matrix."""
    return jnp.sum(a * b, (-2, -1))


def gram_error(matrix: jax.Array) -> jax.Array:
    r"""Returns the largest entry of \(|X^T X - I|\) of a whole stack, as a scalar."""
    return jnp.max(jnp.abs(gram(matrix, matrix) - jnp.eye(matrix.shape[-1], dtype=matrix.dtype)), initial=0.0)
