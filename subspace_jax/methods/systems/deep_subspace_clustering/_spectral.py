"""From coefficients to clusters: a sparse affinity, its Laplacian's smallest eigenvectors, and k-means."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_int

_ISOLATED = 1e-12


def affinity(coefficients: jax.Array, d_sub: int) -> jax.Array:
    """Keeps the largest coefficients of every column and makes them a symmetric graph.

    A column keeps its `d_sub` entries of largest magnitude (ties by index) and is divided by the largest; the result is
    the sum of magnitudes both ways. No threshold is tuned. One more than the subspaces' dimension is a good value: with
    exactly that many, clusters may fall apart.

    Args:
      coefficients: `[samples, samples]`; its diagonal does not count.
      d_sub: coefficients kept per sample; no more than there are other samples.

    Returns:
      `[samples, samples]`, symmetric, not negative, diagonal zero.

    Raises:
      RankError: `d_sub` is no positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> affinity(jnp.array([[9.0, 2.0, 0.0], [1.0, 9.0, -4.0], [-2.0, 1.0, 9.0]]), 1)
      Array([[0., 1., 1.],
             [1., 0., 1.],
             [1., 1., 0.]], dtype=float32)
    """
    count = coefficients.shape[0]
    kept = min(check_int("affinity: d_sub", d_sub), max(count - 1, 1))
    sizes = jnp.where(jnp.eye(count, dtype=bool), -1.0, jnp.abs(coefficients)).T  # rows are columns now
    values, places = jax.lax.top_k(sizes, kept)
    values = jnp.maximum(values, 0.0)
    values = values / jnp.maximum(values[:, :1], jnp.finfo(values.dtype).tiny)
    sparse = jnp.zeros_like(sizes).at[jnp.arange(count)[:, None], places].set(values)
    return sparse + sparse.T


def spectral_clusters(graph: Any, clusters: int, *, seed: int = 0, restarts: int = 10) -> np.ndarray:
    r"""Clusters a graph by k-means on the rows of the \(K\) smallest eigenvectors of \(I - D^{-1/2} A D^{-1/2}\).

    On the host in float64. Isolated samples and graphs of several parts are normal.

    Args:
      graph: \(A\), `[samples, samples]`, symmetric and not negative.
      clusters: \(K\).
      seed: of k-means.
      restarts: of k-means; the best is kept.

    Returns:
      int32 `[samples]`, from 0 to \(K - 1\).

    Raises:
      RankError: `clusters` is not between 1 and the number of samples.
      ValueError: the graph is not square, symmetric, finite and non-negative.

    Example:
      >>> import numpy as np
      >>> labels = spectral_clusters(np.kron(np.eye(2), np.ones((3, 3))), 2)
      >>> bool((labels[:3] == labels[0]).all() and (labels[3:] != labels[0]).all())
      True
    """
    from scipy.linalg import eigh

    a = np.asarray(graph, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not np.isfinite(a).all() or (a < 0).any() or not np.allclose(a, a.T):
        raise ValueError(
            f"spectral_clusters: graph {a.shape}; expected a square, symmetric one without negative edges."
        )
    count = check_int("spectral_clusters: clusters", clusters, 1, len(a))
    root = 1 / np.sqrt(np.maximum(a.sum(1), _ISOLATED))
    laplacian = np.eye(len(a)) - root[:, None] * a * root
    vectors = eigh(laplacian, subset_by_index=[0, count - 1])[1]
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _ISOLATED)
    return k_means(rows, count, seed=seed, restarts=restarts)


def k_means(points: Any, clusters: int, *, seed: int = 0, restarts: int = 10, iterations: int = 300) -> np.ndarray:
    """Clusters points around means: careful seeding, Lloyd's iterations, the best of some restarts; host, float64.

    Args:
      points: `[samples, features]`.
      clusters: how many.
      seed: of the seeding.
      restarts: how often it is tried.
      iterations: at most, of each try.

    Returns:
      int32 `[samples]`.

    Raises:
      RankError: `clusters` is not between 1 and the number of samples.

    Example:
      >>> import numpy as np
      >>> labels = k_means(np.array([[0.0], [0.1], [5.0]]), 2)
      >>> bool(labels[0] == labels[1] != labels[2])
      True
    """
    x = np.asarray(points, np.float64)
    count = check_int("k_means: clusters", clusters, 1, len(x))
    rng, best, least = np.random.default_rng(seed), np.zeros(len(x), np.int32), np.inf
    for _ in range(check_int("k_means: restarts", restarts)):
        means = _seeds(x, count, rng)
        labels = np.full(len(x), -1)
        for _ in range(iterations):
            distances = _squares(x, means)
            found = distances.argmin(1)
            if (found == labels).all():
                break
            labels = found
            for k in range(count):
                inside = labels == k
                # A cluster that lost all its points takes the one that is worst off.
                means[k] = x[inside].mean(0) if inside.any() else x[distances.min(1).argmax()]
        total = _squares(x, means).min(1).sum()
        if total < least:
            best, least = labels.astype(np.int32), total
    return best


def _squares(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    found = (x * x).sum(1)[:, None] + (means * means).sum(1) - 2 * x @ means.T
    return np.maximum(found, 0)


def _seeds(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    means = [x[rng.integers(len(x))]]
    while len(means) < count:
        away = _squares(x, np.stack(means)).min(1)
        chances = away / away.sum() if away.sum() > 0 else None
        means.append(x[rng.choice(len(x), p=chances)])
    return np.stack(means)
