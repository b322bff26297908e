"""Sums of Kronecker products: decomposition by rearrangement into low-rank matrices, and products.

Rearrangement: Approximation with Kronecker Products (Van Loan, Pitsianis, 1993).
"""

from __future__ import annotations

import fractions
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from subspace_jax.linalg._sharding import whole_matrices
from subspace_jax.linalg._svd import randomized_svd, truncated_svd


class KroneckerSplit(NamedTuple):
    """Sizes of two factors whose Kronecker product is a matrix `[m p, n q]`.

    Attributes:
      m: rows of the left factor.
      p: rows of the right factor.
      n: columns of the left factor.
      q: columns of the right factor.
    """

    m: int
    p: int
    n: int
    q: int

    @property
    def terms(self) -> int:
        """The number of terms that suffice for every matrix."""
        return min(self.m * self.n, self.p * self.q)

    @property
    def values(self) -> int:
        """The number of values of one term: both factors and a scale."""
        return self.m * self.n + self.p * self.q + 1


class KroneckerSVD(NamedTuple):
    """A (truncated) Kronecker-product singular value decomposition, largest value first.

    Attributes:
      left: left factors `[*stack, r, m, n]`, each of Frobenius norm 1.
      s: singular values `[*stack, r]`.
      right: right factors `[*stack, r, p, q]`, each of Frobenius norm 1.
    """

    left: jax.Array
    s: jax.Array
    right: jax.Array


def balanced_split(inputs: int, outputs: int) -> KroneckerSplit:
    """Returns the split of a matrix whose two factors have the fewest values together.

    Of several, the one whose factors are nearest to square, then the one with the fewest rows on the left.

    Args:
      inputs: rows of the matrix.
      outputs: columns of the matrix.

    Example:
      >>> tuple(balanced_split(64, 128)), tuple(balanced_split(768, 3072))
      ((8, 8, 8, 16), (24, 32, 64, 48))
    """

    def preference(split: KroneckerSplit) -> tuple[Any, ...]:
        m, p, n, q = split
        # The sum of the logarithms of both aspect ratios, compared without rounding.
        skew = fractions.Fraction(max(m, n), min(m, n)) * fractions.Fraction(max(p, q), min(p, q))
        return m * n + p * q, skew, m, n

    splits = (KroneckerSplit(m, inputs // m, n, outputs // n) for m in _divisors(inputs) for n in _divisors(outputs))
    return min(splits, key=preference)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


@functools.partial(jax.jit, static_argnames="split", inline=True)
def rearrange(matrix: Float[Array, "*stack mp nq"], split: KroneckerSplit) -> Float[Array, "*stack mn pq"]:
    r"""Rearranges a matrix so that its Kronecker terms become low-rank terms.

    \(R(A \otimes B) = \mathrm{vec}(A)\,\mathrm{vec}(B)^T\) with row-major vec; linear, one to one, and it keeps the
    Frobenius norm.

    Args:
      matrix: `[*stack, m p, n q]`.
      split: the sizes.

    Returns:
      `[*stack, m n, p q]`.

    Example:
      >>> import jax.numpy as jnp
      >>> rearrange(jnp.kron(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])), KroneckerSplit(1, 1, 2, 2)).tolist()
      [[3.0, 4.0], [6.0, 8.0]]
    """
    m, p, n, q = split
    stack = matrix.shape[:-2]
    parts = matrix.reshape(*stack, m, p, n, q)
    return jnp.swapaxes(parts, -3, -2).reshape(*stack, m * n, p * q)


@functools.partial(jax.jit, static_argnames="split", inline=True)
def unrearrange(rearranged: Float[Array, "*stack mn pq"], split: KroneckerSplit) -> Float[Array, "*stack mp nq"]:
    """Undoes `rearrange`: returns the matrix `[*stack, m p, n q]`.

    Args:
      rearranged: `[*stack, m n, p q]`.
      split: the sizes.

    Example:
      >>> import jax.numpy as jnp
      >>> split = KroneckerSplit(2, 2, 3, 1)
      >>> matrix = jnp.arange(12.0).reshape(4, 3)
      >>> bool((unrearrange(rearrange(matrix, split), split) == matrix).all())
      True
    """
    m, p, n, q = split
    stack = rearranged.shape[:-2]
    parts = rearranged.reshape(*stack, m, n, p, q)
    return jnp.swapaxes(parts, -3, -2).reshape(*stack, m * p, n * q)


def kronecker_svd(
    matrix: Float[Array, "*stack mp nq"],
    split: KroneckerSplit,
    terms: int,
    *,
    key: jax.Array | None = None,
    oversample: int = 10,
) -> KroneckerSVD:
    r"""Returns the leading Kronecker terms: the best approximation by a sum of so many, in the Frobenius norm.

    \(W \approx \sum_c s_c\,U_c \otimes V_c\), by a singular value decomposition of the rearranged matrix in at
    least float32.

    Args:
      matrix: `[*stack, m p, n q]`, any floating dtype.
      split: the sizes.
      terms: at most `split.terms`.
      key: makes the decomposition a randomized one; consumed.
      oversample: extra columns of the randomized decomposition.

    Example:
      >>> import jax.numpy as jnp
      >>> product = jnp.kron(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0]]))
      >>> found = kronecker_svd(product, KroneckerSplit(1, 1, 2, 2), 1)
      >>> round(float(found.s[0]), 3), found.left.round(3).tolist()
      (6.0, [[[1.0, 0.0]]])
    """
    rearranged = rearrange(whole_matrices(matrix), split)
    if key is None:
        u, s, vt = truncated_svd(rearranged, terms)
    else:
        u, s, vt = randomized_svd(key, rearranged, terms, oversample=oversample)
    shape = (*s.shape, *split)
    left = jnp.swapaxes(u, -1, -2).reshape(*shape[:-4], split.m, split.n)
    return KroneckerSVD(left, s, vt.reshape(*shape[:-4], split.p, split.q))


@functools.partial(jax.jit, inline=True)
def kronecker_sum(
    scales: Float[Array, "*stack r"], left: Float[Array, "*stack r m n"], right: Float[Array, "*stack r p q"]
) -> Float[Array, "*stack m*p n*q"]:
    r"""Returns the sum of Kronecker products \(\sum_c \sigma_c\,U_c \otimes V_c\), `[*stack, m p, n q]`.

    Args:
      scales: \(\sigma\), `[*stack, r]`.
      left: \(U\), `[*stack, r, m, n]`.
      right: \(V\), `[*stack, r, p, q]`.

    Example:
      >>> import jax.numpy as jnp
      >>> kronecker_sum(jnp.array([2.0]), jnp.array([[[1.0, 3.0]]]), jnp.array([[[5.0]]])).tolist()
      [[10.0, 30.0]]
    """
    *stack, terms, m, n = left.shape
    p, q = right.shape[-2:]
    scaled = (scales[..., None, None] * left).reshape(*stack, terms, m * n)
    rearranged = jnp.matmul(
        jnp.swapaxes(scaled, -1, -2), right.reshape(*stack, terms, p * q), precision=lax.Precision.HIGHEST
    )
    return unrearrange(rearranged, KroneckerSplit(m, p, n, q))


def kronecker_rows(
    rows: Float[Array, "*stack t mp"],
    scales: Float[Array, "*stack r"],
    left: Float[Array, "*stack r m n"],
    right: Float[Array, "*stack r p q"],
    *,
    precision: Any = lax.Precision.HIGHEST,
) -> Float[Array, "*stack t n*q"]:
    r"""Multiplies rows by a sum of Kronecker products, which is never formed.

    A row read as \(X\), `[m, p]`, becomes \(\sum_c \sigma_c\,U_c^T X V_c\), `[n, q]`, in the order of fewer operations;
    all terms share one product each time.

    Args:
      rows: `[*stack, t, m p]`.
      scales: `[*stack, r]`.
      left: `[*stack, r, m, n]`.
      right: `[*stack, r, p, q]`.
      precision: of the products.

    Returns:
      `[*stack, t, n q]`.

    Example:
      >>> import jax.numpy as jnp
      >>> left, right = jnp.array([[[1.0, 3.0]]]), jnp.array([[[5.0], [7.0]]])
      >>> kronecker_rows(jnp.array([[1.0, 1.0]]), jnp.array([2.0]), left, right).tolist()
      [[24.0, 72.0]]
    """
    m, n = left.shape[-2:]
    p, q = right.shape[-2:]
    x = rows.reshape(*rows.shape[:-1], m, p)
    scaled = scales[..., None, None] * left
    if m * p * q + m * n * q <= m * n * p + n * p * q:
        half = jnp.einsum("...tmp,...cpq->...tcmq", x, right, precision=precision)
        out = jnp.einsum("...tcmq,...cmn->...tnq", half, scaled, precision=precision)
    else:
        half = jnp.einsum("...tmp,...cmn->...tcnp", x, scaled, precision=precision)
        out = jnp.einsum("...tcnp,...cpq->...tnq", half, right, precision=precision)
    return out.reshape(*rows.shape[:-1], n * q)
