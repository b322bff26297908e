"""The optional kernel form: principal components in the feature space of a kernel."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_choice, check_int, check_number
from subspace_jax.linalg import wide_matmul

from ._fit import needed_rank

Kernel = Literal["rbf", "linear"]


class KernelSubspace(NamedTuple):
    """A principal subspace in a kernel's feature space, by the patches that span it.

    Attributes:
      mean: of the features, `[features]`.
      deviation: their standard deviation, `[features]`.
      points: standardized patches, `[patches, features]`.
      weights: of the patches in each component, `[patches, rank]`.
      row_means: mean of every row of the kernel matrix, `[patches]`.
      gamma: of the RBF kernel; NaN for the linear one.
    """

    mean: jax.Array
    deviation: jax.Array
    points: jax.Array
    weights: jax.Array
    row_means: jax.Array
    gamma: jax.Array


def fit_kernel_subspace(
    features: jax.Array,
    *,
    tau: float = 0.99,
    rank: int | None = None,
    kernel: Kernel = "rbf",
    gamma: float | None = None,
) -> KernelSubspace:
    r"""Fits kernel PCA to standardized patches: eigenvectors of the centered kernel matrix \(H K H\).

    Memory grows with the square of the number of patches; draw a sample of a few thousand.

    Args:
      features: `[patches, features]`.
      tau: share of the centered kernel's trace that the components hold.
      rank: a fixed number of components in place of `tau`.
      kernel: "rbf", \(\exp(-\gamma \|x - y\|^2)\), or "linear".
      gamma: one over the number of features by default.

    Returns:
      The subspace.

    Raises:
      ValueError: options out of range, or features that are not a finite matrix of two or more rows.

    Example:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> score_kernel(fit_kernel_subspace(x, rank=5), x).shape
      (20,)
    """
    check_choice("fit_kernel_subspace: kernel", kernel, ("rbf", "linear"))
    check_number("fit_kernel_subspace: tau", tau, above=0.0, most=1.0)
    x = jnp.asarray(features)
    if x.ndim != 2 or len(x) < 2 or not bool(jnp.isfinite(x).all()):
        raise ValueError(f"fit_kernel_subspace: features {x.shape}; expected finite [patches, features], 2 or more.")
    if rank is not None:
        rank = check_int("fit_kernel_subspace: rank", rank, 0, len(x))
    if gamma is not None:
        check_number("fit_kernel_subspace: gamma", gamma, above=0.0)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, deviation = jnp.mean(x, axis=0), jnp.std(x, axis=0)
    deviation = jnp.where(deviation > 0, deviation, 1)
    points = (x - mean) / deviation
    scale = jnp.asarray(jnp.nan if kernel == "linear" else gamma or 1.0 / x.shape[1], x.dtype)
    matrix = np.asarray(_kernel(points, points, scale), np.float64)
    row_means = matrix.mean(1)
    centered = matrix - row_means[:, None] - row_means[None] + matrix.mean()
    values, vectors = np.linalg.eigh(centered)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    values = np.where(values > 1e-6 * values[0], values, 0.0)
    used = needed_rank(values, tau) if rank is None else min(rank, int(np.count_nonzero(values)))
    weights = vectors[:, :used] / np.sqrt(values[:used])
    return KernelSubspace(
        mean, deviation, points, jnp.asarray(weights, x.dtype), jnp.asarray(row_means, x.dtype), scale
    )


def _kernel(x: jax.Array, y: jax.Array, gamma: jax.Array) -> jax.Array:
    products = wide_matmul(x, y.T)
    squares = jnp.sum(x * x, -1)[:, None] + jnp.sum(y * y, -1) - 2 * products
    return jnp.where(jnp.isnan(gamma), products, jnp.exp(-gamma * jnp.maximum(squares, 0)))


@jax.jit
def score_kernel(subspace: KernelSubspace, features: jax.Array) -> jax.Array:
    r"""Scores patches by what the components leave of them: \(\max(0, \tilde k(x, x) - \|V^T \tilde\phi(x)\|^2)\).

    Args:
      subspace: of normal patches.
      features: `[..., features]`.

    Returns:
      `[...]`.

    Example:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> bool((score_kernel(fit_kernel_subspace(x, tau=1.0), x) < 1e-4).all())
      True
    """
    rows = features.reshape(-1, features.shape[-1]).astype(subspace.mean.dtype)
    rows = (rows - subspace.mean) / subspace.deviation
    total = jnp.mean(subspace.row_means)
    cross = _kernel(rows, subspace.points, subspace.gamma)
    means = jnp.mean(cross, axis=-1)
    itself = jnp.where(jnp.isnan(subspace.gamma), jnp.sum(rows * rows, axis=-1), 1.0)
    centered = cross - means[:, None] - subspace.row_means + total
    inside = jnp.sum(jnp.square(wide_matmul(centered, subspace.weights)), axis=-1)
    return jnp.maximum(itself - 2 * means + total - inside, 0).reshape(features.shape[:-1])
