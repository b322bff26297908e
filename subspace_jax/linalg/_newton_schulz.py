"""Newton-Schulz orthogonalization, which needs products alone."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.linalg._subspace import wide_matmul

# Newton-Schulz of five steps with coefficients of their own, which orthogonalize further than one triple for all.
NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(
    matrix: Float[Array, "*stack m n"],
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_COEFFICIENTS,
) -> Float[Array, "*stack m n"]:
    r"""Orthogonalizes a matrix by products alone: keeps its singular vectors and takes singular values near 1.

    \(X \leftarrow a X + (b\,Y + c\,Y^2)\,X\) with \(Y = X X^T\), from \(X / \|X\|\). A matrix of zeros stays zero.

    Args:
      matrix: `[*stack, m, n]`.
      coefficients: \((a, b, c)\) of every step.

    Returns:
      `[*stack, m, n]`, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> bool(jnp.allclose(newton_schulz(jnp.diag(jnp.array([3.0, 1.0]))), jnp.eye(2), atol=0.4))
      True

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024 (the iteration).
      Their single triple is (3.4445, -4.7750, 2.0315); the default ones are those that optax calls "dion".
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for a, b, c in coefficients:
        gram = wide_matmul(x, jnp.swapaxes(x, -1, -2), split=(-2, None))
        x = a * x + wide_matmul(b * gram + c * wide_matmul(gram, gram, split=(-2, None)), x)
    return jnp.swapaxes(x, -1, -2) if tall else x
