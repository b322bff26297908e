"""Numerics of matrices with orthonormal columns, which the manifolds share."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array, Float

from subspace_jax.linalg import by_compiler, polar, whole_matrices, wide_dtype, wide_matmul


def widened(*arrays: Float[Array, "... n k"]) -> tuple[Float[Array, "... n k"], ...]:
    """Returns the arrays in at least float32, with matrices whole on every device."""
    return tuple(whole_matrices(jnp.asarray(v).astype(wide_dtype(jnp.asarray(v).dtype))) for v in arrays)


def transposed(matrix: Float[Array, "*stack m n"]) -> Float[Array, "*stack n m"]:
    """Returns the transposed matrices of a stack."""
    return jnp.swapaxes(matrix, -1, -2)


def product(*matrices: Float[Array, "... _ _"]) -> Float[Array, "... m n"]:
    """Returns a product of whole stacked matrices, from left to right, in full precision."""
    left, *rest = matrices
    for right in rest:
        left = wide_matmul(left, right)
    return left


def gram(left: Float[Array, "*stack n k"], right: Float[Array, "*stack n m"]) -> Float[Array, "*stack k m"]:
    r"""Returns \(A^T B\), `[*stack, k, m]`."""
    return product(transposed(left), right)


def exponential(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """Returns the matrix exponential of whole stacked matrices, also where the stack is split."""
    return by_compiler(expm, matrix)


def symmetric(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """Returns the symmetric part."""
    return (matrix + transposed(matrix)) / 2


def skew_part(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """Returns the skew-symmetric part."""
    return (matrix - transposed(matrix)) / 2


def qr_frame(matrix: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
    r"""Returns the orthonormal factor of \(A = Q R\) for the \(R\) whose diagonal is positive.

    Without the rule for signs LAPACK may flip a column, against which a stored momentum would then run.
    """
    return by_compiler(_qr_frame, matrix)


def _qr_frame(matrix: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
    q, r = jnp.linalg.qr(matrix)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1.0, 1.0).astype(q.dtype)[..., None, :]


def polar_frame(matrix: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
    r"""Returns \(U V^T\) of the thin SVD: the nearest matrix with orthonormal columns."""
    return polar(matrix)


def frobenius(a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> Float[Array, " *stack"]:
    r"""Returns \(\langle A, B \rangle\), the sum of products of entries of each matrix."""
    return jnp.sum(a * b, (-2, -1))


def gram_error(matrix: Float[Array, "*stack n k"]) -> Float[Array, ""]:
    r"""Returns the largest entry of \(|X^T X - I|\) of a whole stack, as a scalar."""
    return jnp.max(jnp.abs(gram(matrix, matrix) - jnp.eye(matrix.shape[-1], dtype=matrix.dtype)), initial=0.0)
