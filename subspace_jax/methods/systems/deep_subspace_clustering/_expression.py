"""Self-expression: every sample as a combination of the others, with one matrix for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_number
from subspace_jax.linalg import wide_matmul

_SMALLEST = 1e-8


def normalize_rows(features: jax.Array) -> jax.Array:
    """Divides every row by its norm, so that no layer can shrink its features to express them cheaply.

    Args:
      features: `[samples, ...]`; what follows the first axis is flattened.

    Returns:
      `[samples, features]`, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> normalize_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
      Array([[0.6, 0.8],
             [0. , 0. ]], dtype=float32)
    """
    rows = features.reshape(features.shape[0], -1)
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    # The root of a square that is floored has a gradient at a row of zeros as well.
    return rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(rows), -1, keepdims=True), _SMALLEST**2))


def without_diagonal(coefficients: jax.Array) -> jax.Array:
    """Returns the matrix with zeros on its diagonal: no sample expresses itself.

    Args:
      coefficients: `[samples, samples]`.

    Example:
      >>> import jax.numpy as jnp
      >>> without_diagonal(jnp.ones((2, 2)))
      Array([[0., 1.],
             [1., 0.]], dtype=float32)
    """
    return coefficients * (1 - jnp.eye(coefficients.shape[0], dtype=coefficients.dtype))


def expression_loss(coefficients: jax.Array, layers: Sequence[jax.Array], rho: float | jax.Array = 1.0) -> jax.Array:
    r"""Returns \(\frac{1}{n}\left(\sum_l \|\hat Z_l - C^T \hat Z_l\|_F^2 + \rho \|C\|_F^2\right)\), diagonal of C zero.

    Column \(j\) of \(C\) expresses sample \(j\): \(x_j \approx \sum_i C_{ij} x_i\).

    Args:
      coefficients: \(C\), `[samples, samples]`; its diagonal does not count.
      layers: features of each layer, `[samples, ...]`, raw; the same matrix expresses all of them.
      rho: of the ridge. Rows have unit norm, so one value serves all data.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> expression_loss(jnp.zeros((3, 3)), [jnp.eye(3), jnp.eye(3)])
      Array(2., dtype=float32)
    """
    c = without_diagonal(coefficients)
    stacked = jnp.concatenate([normalize_rows(z) for z in layers], axis=-1)
    missed = stacked - wide_matmul(c.T, stacked)
    return (jnp.sum(jnp.square(missed)) + rho * jnp.sum(jnp.square(c))) / c.shape[0]


def closed_form(layers: Sequence[Any], rho: float = 1.0) -> jax.Array:
    r"""Returns the matrix that minimizes `expression_loss` for given features, exactly.

    With \(G = \sum_l \hat Z_l \hat Z_l^T\) and \(D = (G + \rho I)^{-1}\) it is \(C_{ij} = -D_{ij} / D_{jj}\), zero on
    the diagonal: each column is a ridge regression on all other samples. Inverted on the host in float64.

    Args:
      layers: as of `expression_loss`.
      rho: positive.

    Returns:
      `[samples, samples]`, float32.

    Raises:
      ValueError: rho is not positive; the matrix may be singular then.

    Example:
      >>> import jax.numpy as jnp
      >>> closed_form([jnp.ones((2, 3))])  # two equal rows: 1 / (1 + rho)
      Array([[0. , 0.5],
             [0.5, 0. ]], dtype=float32)
    """
    check_number("closed_form: rho", rho, above=0.0)
    gram: Any = 0.0
    for z in layers:
        rows = np.asarray(normalize_rows(jnp.asarray(z)), np.float64)
        gram = gram + rows @ rows.T
    inverse = np.linalg.inv(gram + rho * np.eye(len(gram)))
    found = -inverse / np.diag(inverse)
    np.fill_diagonal(found, 0.0)
    return jnp.asarray(found, jnp.float32)


def structured_norm(coefficients: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Returns \(\|C\|_Q = \sum_{ij} |C_{ij}| \frac12 \|q_i - q_j\|^2\): the mass that connects different clusters.

    Args:
      coefficients: `[samples, samples]`; its diagonal does not count.
      labels: `[samples]` integers; their names do not matter.

    Returns:
      A scalar, zero if and only if no coefficient connects two clusters.

    Example:
      >>> import jax.numpy as jnp
      >>> structured_norm(jnp.ones((3, 3)), jnp.array([0, 0, 1]))
      Array(4., dtype=float32)
    """
    return jnp.sum(jnp.where(labels[:, None] != labels[None], jnp.abs(coefficients), 0))
