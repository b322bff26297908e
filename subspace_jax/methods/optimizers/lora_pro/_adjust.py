"""LoRA-Pro's steps: those of two factors whose change of the weight is closest to its full gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import whole_matrices, wide_matmul

# Eigenvalues of a Gram matrix in float32 are rounding below this share of the largest one.
CUTOFF = 16 * float(jnp.finfo(jnp.float32).eps)


class Adjusted(NamedTuple):
    """LoRA-Pro's steps for one pair of factors.

    Attributes:
      a: \\(a\\), like \\(A\\), in float32.
      b: \\(b\\), like \\(B\\), in float32.
    """

    a: jax.Array
    b: jax.Array


def adjust_pair(
    a: jax.Array, b: jax.Array, a_gradient: jax.Array, b_gradient: jax.Array, scale: float, *, delta: float = 1e-8
) -> Adjusted:
    r"""Returns the steps of both factors whose change of the weight is closest to its full gradient.

    \(\min_{a, b} \|s\,a B + s\,A b - G\|^2\) with \(g_A = s\,G B^T\), \(g_B = s\,A^T G\) needs no \(G\):
    \(a = \frac{1}{s^2} g_A (B B^T)^{-1} + A X\), \(b = \frac{1}{s^2} (A^T A)^{-1} g_B (I - P_B) - X B\), where \(X\)
    solves \(A^T A\,X + X\,B B^T = -\frac{1}{s^2} A^T g_A (B B^T)^{-1}\), so that the steps stay closest to the
    gradients.
    While \(B = 0\), \(a = g_A\), \(b = \frac{1}{s^2} (A^T A)^{-1} g_B\) and \(X = 0\).

    Args:
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`.
      a_gradient: \(g_A\).
      b_gradient: \(g_B\).
      scale: \(s\).
      delta: added to the eigenvalues of the Gram matrices before they are inverted. Eigenvalues below
        \(16\,\epsilon\) of the largest are rounding, as where a batch has fewer examples than the rank; their
        directions are left out.

    Returns:
      The steps of both factors, in float32.
    """
    plain = plain_pair(a, b, a_gradient, b_gradient, scale, delta=delta)
    a, b = (v.astype(jnp.float32) for v in (a, b))
    a_values, a_vectors = _gram(_transposed(a), a)
    b_values, b_vectors = _gram(b, _transposed(b))
    # The right-hand side is minus A^T times the plain step of A.
    right = -wide_matmul(_transposed(a), plain.a, split=(None, None))
    turned = wide_matmul(wide_matmul(_transposed(a_vectors), right), b_vectors)
    # In a direction that A does not have, the right-hand side is rounding.
    live = (a_values > 0)[..., :, None] & ~_is_first(b_values)
    sums = jnp.maximum(a_values[..., :, None] + b_values[..., None, :], delta)
    x = wide_matmul(wide_matmul(a_vectors, jnp.where(live, turned / sums, 0.0)), _transposed(b_vectors))
    return Adjusted(plain.a + wide_matmul(a, x), plain.b - wide_matmul(x, b))


def plain_pair(
    a: jax.Array, b: jax.Array, a_gradient: jax.Array, b_gradient: jax.Array, scale: float, *, delta: float = 1e-8
) -> Adjusted:
    r"""Returns LoRA-Pro's steps without the Sylvester term, \(X = 0\): the same change to first order, at less cost.

    Args:
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`.
      a_gradient: \(g_A\).
      b_gradient: \(g_B\).
      scale: \(s\).
      delta: added to the eigenvalues of the Gram matrices before they are inverted.

    Returns:
      The steps of both factors, in float32.
    """
    a, b, a_gradient, b_gradient = (v.astype(jnp.float32) for v in (a, b, a_gradient, b_gradient))
    a_inverse = _inverse(*_gram(_transposed(a), a), delta)
    b_values, b_vectors = _gram(b, _transposed(b))
    b_inverse, first = _inverse(b_values, b_vectors, delta), _is_first(b_values)
    a_step = jnp.where(first, a_gradient, wide_matmul(a_gradient, b_inverse) / scale**2)
    inside = wide_matmul(wide_matmul(b_gradient, _transposed(b), split=(None, None)), b_inverse)
    outside = b_gradient - wide_matmul(inside, b)
    return Adjusted(a_step, wide_matmul(a_inverse, outside) / scale**2)


def equivalent_gradient(a: jax.Array, b: jax.Array, step: Adjusted, scale: float) -> jax.Array:
    r"""Returns the change of the weight by steps of its factors, to first order: \(s\,a B + s\,A b\), in float32.

    Args:
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`.
      step: steps of both.
      scale: \(s\).
    """
    return scale * (wide_matmul(step.a, b) + wide_matmul(a, step.b))


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _gram(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a product that is symmetric and not negative; zero what is rounding."""
    gram = wide_matmul(left, right, split=(None, None))
    values, vectors = jnp.linalg.eigh(whole_matrices(gram))
    return jnp.where(values > CUTOFF * values[..., -1:], values, 0.0), vectors


def _inverse(values: jax.Array, vectors: jax.Array, delta: float) -> jax.Array:
    """The inverse where there are eigenvalues; directions without one, which gradients do not have, stay out."""
    inverted = jnp.where(values > 0, 1.0 / (values + delta), 0.0)
    return wide_matmul(vectors * inverted[..., None, :], _transposed(vectors))


def _is_first(b_values: jax.Array) -> jax.Array:
    """Whether B is still zero, `[*stack, 1, 1]`."""
    return jnp.sum(b_values, -1)[..., None, None] <= jnp.finfo(jnp.float32).tiny
