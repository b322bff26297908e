"""Penalizes matrices that are further than a given distance from orthogonal; the penalty and its gradient."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Role, StructureError, is_weight
from subspace_jax.linalg import wide_dtype, wide_matmul

# 12 for the published 1024 x 1024 kernels; the distance of a random kernel from orthogonality grows likewise.
SCALE_FREE = 0.375


def soft_orthogonality(w: Any, *, role: Role | None = None) -> jax.Array:
    r"""Returns how far matrices are from orthogonal: \(x = \|W^T W - I\|_F = \sqrt{\sum_i (\sigma_i^2 - 1)^2}\).

    Of a matrix that is not square the smaller Gram matrix counts, so that zero can be reached. Rotating inputs or
    outputs changes nothing. Where \(x = 0\) its gradient is zero.

    Args:
      w: \(W\), an array `[*stack, in, out]`, or a stand-in weight, of which the array it stands for counts.
      role: how the model uses a plain array with more axes.

    Returns:
      `[*stack]` in float32 (float64 if the array is that).

    Raises:
      StructureError: fewer than two axes.
      RoleError: the role is not that of a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> soft_orthogonality(jnp.eye(3)).item(), soft_orthogonality(2 * jnp.eye(4)).item()
      (0.0, 6.0)
    """
    return _distance(_gram_error(_matrices(w, role)))


def lambda_orthogonality(
    w: Any, lam: float | jax.Array | None = None, alpha: float | jax.Array = 1.0, *, role: Role | None = None
) -> jax.Array:
    r"""Penalizes matrices beyond a distance \(\lambda\) from orthogonal: \(\sigma(\alpha (x - \lambda))\,x\).

    The distance is \(x = \|W^T W - I\|_F\); the terms of a stack are summed.

    Below \(\lambda\) the gate closes and the matrix is free; above, the whole pull toward orthogonality acts. Large
    \(\alpha\) makes the gate a step. \(\lambda = -\infty\) leaves soft orthogonality \(x\), as does \(\lambda = 0\)
    where \(\alpha x \gg 1\) (at \(x = 0\) the gate is half open); \(\lambda = \infty\) removes the term.

    \(\lambda\) depends on the size: a random kernel of n columns is about \(0.75 \sqrt{n}\) away, and above the
    distance that training would reach anyway it does nothing. The published 12 is for kernels 1024 x 1024.

    Args:
      w: \(W\), an array `[*stack, in, out]`, or a stand-in weight, of which the array it stands for counts.
      lam: \(\lambda\), the allowed distance; \(0.375 \sqrt{n}\) if None, with n the smaller side, which is the
        published 12 at 1024.
      alpha: \(\alpha\), steepness of the gate; positive.
      role: how the model uses a plain array with more axes.

    Returns:
      A scalar in float32 (float64 if the array is that).

    Raises:
      ValueError: `alpha` is not a positive number.
      StructureError: fewer than two axes.
      RoleError: the role is not that of a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> far = 2 * jnp.eye(4)  # at a distance of 6
      >>> [round(lambda_orthogonality(far, lam).item(), 3) for lam in (0.0, 6.0, 60.0)]
      [5.985, 3.0, 0.0]
    """
    _check_alpha(alpha)
    matrix = _matrices(w, role)
    x = _distance(_gram_error(matrix))
    return jnp.sum(jax.nn.sigmoid(alpha * (x - _allowed(lam, matrix))) * x)


def lambda_orthogonality_gradient(
    matrix: jax.Array, lam: float | jax.Array | None = None, alpha: float | jax.Array = 1.0
) -> jax.Array:
    r"""Returns the gradient of `lambda_orthogonality`, \((s + \alpha x s (1 - s))\,\frac{2}{x} W (W^T W - I)\).

    \(s = \sigma(\alpha (x - \lambda))\). Two products, also where matrices are split over explicit mesh axes.

    Args:
      matrix: \(W\), `[*stack, in, out]`.
      lam: \(\lambda\), the allowed distance; \(0.375 \sqrt{n}\) if None, with n the smaller side.
      alpha: \(\alpha\), steepness of the gate; positive.

    Returns:
      An array like `matrix` in float32 (float64 if it is that); zero where \(x = 0\).

    Example:
      >>> import jax.numpy as jnp
      >>> lambda_orthogonality_gradient(jnp.array([[2.0]]), lam=3.0).item()  # x = w² - 1 = 3, the gate half open
      5.0
    """
    _check_alpha(alpha)
    matrix = _matrices(matrix)
    error = _gram_error(matrix)
    x = _distance(error)
    gate = jax.nn.sigmoid(alpha * (x - _allowed(lam, matrix)))
    slope = (gate + alpha * x * gate * (1 - gate)) * 2 / jnp.where(x > 0, x, 1.0)
    if _is_tall(matrix):
        return slope[..., None, None] * wide_matmul(matrix, error, split=(-2, None))
    return slope[..., None, None] * wide_matmul(error, matrix, split=(None, -1))


def _matrices(w: Any, role: Role | None = None) -> jax.Array:
    """The matrices to regularize, in at least float32."""
    if is_weight(w):
        return w.role.matrix(w.materialize(wide_dtype(w.dtype)))
    w = jnp.asarray(w)
    matrix = w if role is None else role.matrix(w)
    if matrix.ndim < 2:
        raise StructureError(
            f"Shape {matrix.shape} is not a matrix, and orthogonality has no meaning for it; expected [*stack, in, "
            "out]. Leave biases and scales out."
        )
    return matrix.astype(wide_dtype(matrix.dtype))


def _is_tall(matrix: jax.Array) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]


def _gram_error(matrix: jax.Array) -> jax.Array:
    """The smaller Gram matrix without the identity, whole on every device."""
    other = jnp.swapaxes(matrix, -1, -2)
    pair = (other, matrix) if _is_tall(matrix) else (matrix, other)
    gram = wide_matmul(*pair, split=(None, None))
    return gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)


def _distance(error: jax.Array) -> jax.Array:
    """Frobenius norms with gradient zero where they are zero."""
    squares = jnp.sum(jnp.square(error), (-2, -1))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _allowed(lam: float | jax.Array | None, matrix: jax.Array) -> float | jax.Array:
    return SCALE_FREE * math.sqrt(min(matrix.shape[-2:])) if lam is None else lam


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, (int, float)) and not 0 < alpha < math.inf:
        raise ValueError(
            f"lambda_orthogonality: alpha={alpha}; expected a positive finite number. A large one, 1e3 say, makes the "
            "gate a step."
        )
