"""The cosine transform of rows by products with half of the operations: even and odd terms apart, again and again."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from subspace_jax.linalg._cosine_matrix import cosine_matrix

# Rows of this length or longer are cut in halves; products with shorter ones are too small to gain by it.
FOLDED_FROM = 64


def cosine_rows(rows: Float[Array, "*stack n"], *, inverse: bool = False) -> Float[Array, "*stack n"]:
    r"""Returns the orthonormal cosine transform \(x C^T\) of every row, or its inverse \(x C\).

    Terms of even index see the sum of a row and its reverse, which is a transform of half the length; those of odd
    index see the difference, \(x_j - x_{N-1-j}\) for \(j < N / 2\), by one product with a quarter of the matrix. That
    goes on while the length is even and at least 64: a third of the plain product's multiplications in the end.

    Where there are several devices it is the plain product, since halves of a row that is split would have to move.

    Args:
      rows: `[*stack, n]`.
      inverse: transform back.

    Returns:
      `[*stack, n]`, in the dtype of `rows`.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine_rows(jnp.arange(2.0)).round(3).tolist()
      [0.7070000171661377, -0.7070000171661377]
      >>> bool(jnp.allclose(cosine_rows(cosine_rows(jnp.arange(128.0)), inverse=True), jnp.arange(128.0), atol=1e-3))
      True
    """
    size = rows.shape[-1]
    matrix = cosine_matrix(size, rows.dtype)
    if not is_folded(size):
        return _product(rows, matrix if inverse else matrix.T)
    half = size // 2
    odd_terms = matrix[1::2, :half]
    if inverse:
        even = cosine_rows(rows[..., 0::2], inverse=True) * math.sqrt(0.5)
        odd = _product(rows[..., 1::2], odd_terms)
        return jnp.concatenate([even + odd, jnp.flip(even - odd, -1)], axis=-1)
    front, back = rows[..., :half], jnp.flip(rows[..., half:], -1)
    even = cosine_rows(front + back) * math.sqrt(0.5)
    odd = _product(front - back, odd_terms.T)
    return jnp.stack([even, odd], axis=-1).reshape(rows.shape)


def is_folded(size: int) -> bool:
    """Returns whether a transform of this length is cut in halves.

    >>> is_folded(63)
    False
    """
    return size % 2 == 0 and size >= FOLDED_FROM and jax.device_count() == 1


def transform_share(size: int) -> float:
    """Returns the multiplications of a transform of this length, as a share of a plain product's.

    >>> transform_share(63)
    1.0
    """
    return 0.25 + 0.25 * transform_share(size // 2) if is_folded(size) else 1.0


def _product(left: Float[Array, "*stack k"], right: Float[Array, "k n"]) -> Float[Array, "*stack n"]:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
