"""Truncated singular value decompositions in float32: exact, of a product of factors, or randomized.

Randomized range finding: Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate
Matrix Decompositions (Halko, Martinsson, Tropp, 2011).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from subspace_jax.linalg._sharding import layers_apart, whole_matrices
from subspace_jax.linalg._subspace import wide_matmul


class SVD(NamedTuple):
    """A (truncated) singular value decomposition, largest value first.

    Attributes:
      u: left singular vectors `[*stack, m, r]`.
      s: singular values `[*stack, r]`.
      vt: right singular vectors `[*stack, r, n]`.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


def wide_dtype(dtype) -> jnp.dtype:
    """Returns the dtype to compute in: float32, or float64 for float64 input."""
    # Floats of 8 and fewer bits, which JAX does not promote by itself, count as those of 16.
    return jnp.promote_types(jnp.bfloat16 if jnp.finfo(dtype).bits <= 8 else dtype, jnp.float32)


def is_narrow(dtype) -> bool:
    """Returns whether a dtype is narrower than the one to compute in: bfloat16, float16 and floats of 8 and fewer bits.

    A step on such weights multiplies in their dtype, with float32 sums inside of products, and converts nothing large.

    Example:
      >>> import jax.numpy as jnp
      >>> is_narrow(jnp.bfloat16), is_narrow(jnp.float32)
      (True, False)
    """
    return wide_dtype(dtype) != dtype


def fix_signs(
    u: Float[Array, "*stack m r"], vt: Float[Array, "*stack r n"]
) -> tuple[Float[Array, "*stack m r"], Float[Array, "*stack r n"]]:
    """Flips signs so that the largest entry of each left vector is positive, the same on every backend.

    Args:
      u: `[*stack, m, r]`.
      vt: `[*stack, r, n]`.

    Returns:
      Both, with the product of each pair of vectors unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> u, vt = fix_signs(jnp.array([[-1.0], [0.0]]), jnp.array([[2.0, 0.0]]))
      >>> u[0, 0].item(), vt[0, 0].item()
      (1.0, -2.0)
    """
    largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(u, largest, axis=-2) < 0, -1, 1).astype(u.dtype)
    return u * sign, vt * jnp.swapaxes(sign, -1, -2)


def truncated_svd(matrix: Float[Array, "*stack m n"], rank: int) -> SVD:
    """Returns the leading `rank` singular triples by a full decomposition.

    Args:
      matrix: `[*stack, m, n]`, any floating dtype.
      rank: at most `min(m, n)`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(v, 3) for v in truncated_svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2).s.tolist()]
      [3.0, 2.0]
    """
    return _truncated(layers_apart(matrix), rank)


# One compiled program per shape and setting, whoever calls: outside jit a loop would be compiled anew by every call.
@functools.partial(jax.jit, static_argnames="rank")
def _truncated(matrix: Float[Array, "*stack m n"], rank: int) -> SVD:
    matrix = whole_matrices(matrix).astype(wide_dtype(matrix.dtype))
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    u, vt = fix_signs(u[..., :rank], vt[..., :rank, :])
    return SVD(u, s[..., :rank], vt)


def product_svd(left: Float[Array, "*stack m r"], right: Float[Array, "*stack r n"]) -> SVD:
    r"""Returns the singular triples of a product of two factors without forming it.

    With QR factorizations \(A = Q_A R_A\) and \(B^T = Q_B R_B\) they are those of the small \(R_A R_B^T\), turned by
    \(Q_A\) and \(Q_B\): \(O((m + n) r^2 + r^3)\) operations.

    Args:
      left: \(A\), `[*stack, m, r]`, any floating dtype.
      right: \(B\), `[*stack, r, n]`.

    Returns:
      \(\min(m, n, r)\) triples, all that the product can have; in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> found = product_svd(jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0, 0.0]]))
      >>> [round(v, 3) for v in (*found.u[:, 0].tolist(), *found.s.tolist())]
      [0.6, 0.8, 10.0]
    """
    return _product(layers_apart(left), layers_apart(right))


@jax.jit
def _product(left: Float[Array, "*stack m r"], right: Float[Array, "*stack r n"]) -> SVD:
    wide = wide_dtype(jnp.promote_types(left.dtype, right.dtype))
    q, r = jnp.linalg.qr(whole_matrices(left).astype(wide))
    p, t = jnp.linalg.qr(jnp.swapaxes(whole_matrices(right).astype(wide), -1, -2))
    u, s, vt = jnp.linalg.svd(wide_matmul(r, jnp.swapaxes(t, -1, -2)), full_matrices=False)
    u, vt = fix_signs(wide_matmul(q, u), wide_matmul(vt, jnp.swapaxes(p, -1, -2)))
    return SVD(u, s, vt)


def randomized_svd(
    key: jax.Array, matrix: Float[Array, "*stack m n"], rank: int, *, iterations: int = 4, oversample: int = 8
) -> SVD:
    """Returns the leading `rank` singular triples by a randomized range finder.

    A Gaussian test matrix of `rank + oversample` columns, `iterations` power iterations with a QR factorization
    after every product, then the decomposition of the small projected matrix.

    Args:
      key: a random key; it is consumed.
      matrix: `[*stack, m, n]`, any floating dtype.
      rank: at most `min(m, n)`.
      iterations: power iterations; more sharpen the result where singular values decay slowly.
      oversample: extra columns, dropped at the end.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> m = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> [round(v, 3) for v in randomized_svd(jax.random.key(0), m, 2).s.tolist()]
      [3.0, 2.0]
    """
    return _randomized(key, matrix, rank, iterations, oversample)


@functools.partial(jax.jit, static_argnames=("rank", "iterations", "oversample"))
def _randomized(key: jax.Array, matrix: Float[Array, "*stack m n"], rank: int, iterations: int, oversample: int) -> SVD:
    matrix = whole_matrices(matrix).astype(wide_dtype(matrix.dtype))
    *stack, m, n = matrix.shape
    columns = min(rank + oversample, m, n)

    def times(left: Float[Array, "*stack a b"], right: Float[Array, "*stack b c"]) -> Float[Array, "*stack a c"]:
        return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)

    def orthonormal(columns: Float[Array, "*stack d r"]) -> Float[Array, "*stack d r"]:
        return jnp.linalg.qr(columns)[0]

    def transposed(q: Float[Array, "*stack m r"]) -> Float[Array, "*stack n r"]:
        # The few rows are transposed, not the matrix: a loop would hold it both ways. Without the barrier the compiler
        # joins the transpose to the product, which is then slower for few columns.
        rows = lax.optimization_barrier(times(jnp.swapaxes(q, -1, -2), matrix))
        return jnp.swapaxes(rows, -1, -2)

    test = jax.random.normal(key, (*stack, n, columns), matrix.dtype)

    def power(_: int, q: Float[Array, "*stack m r"]) -> Float[Array, "*stack m r"]:
        return orthonormal(times(matrix, orthonormal(transposed(q))))

    q = lax.fori_loop(0, iterations, power, orthonormal(times(matrix, test)))
    # The projected matrix is wide and short; its decomposition goes through the small side.
    small, s, vt = jnp.linalg.svd(times(jnp.swapaxes(q, -1, -2), matrix), full_matrices=False)
    u, vt = fix_signs(times(q, small)[..., :rank], vt[..., :rank, :])
    return SVD(u, s[..., :rank], vt)
