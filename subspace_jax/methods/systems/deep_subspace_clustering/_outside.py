"""Samples that were not clustered: each belongs to the cluster whose subspace leaves least of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_int
from subspace_jax.linalg import wide_matmul

from ._expression import normalize_rows


def cluster_subspaces(features: Any, labels: Any, dim: int) -> list[jax.Array]:
    """Returns a basis of each cluster's features: subspaces through the origin, as self-expression has them.

    Args:
      features: `[samples, features]`, such as those of a `Clustering`; rows are normalized.
      labels: `[samples]` integers from 0.
      dim: dimension of the subspaces; of a cluster with fewer samples, their number.

    Returns:
      Arrays `[features, at most dim]` with orthonormal columns, one for each cluster.

    Raises:
      RankError: `dim` is not positive, or above the number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> [b.shape for b in cluster_subspaces(jnp.eye(4), jnp.array([0, 0, 1, 1]), 2)]
      [(4, 2), (4, 2)]
    """
    rows, labels = np.asarray(normalize_rows(jnp.asarray(features)), np.float64), np.asarray(labels)
    dim = check_int("cluster_subspaces: dim", dim, 1, rows.shape[1])
    found = [np.linalg.svd(rows[labels == k], full_matrices=False)[2][:dim].T for k in range(int(labels.max()) + 1)]
    return [jnp.asarray(basis, jnp.float32) for basis in found]


def nearest_subspace(features: Any, subspaces: list[jax.Array]) -> jax.Array:
    r"""Returns the cluster of each sample: that of the smallest \(\|z - B_k B_k^T z\|\).

    Args:
      features: `[samples, features]` of the same layer; rows are normalized.
      subspaces: of `cluster_subspaces`.

    Returns:
      int32 `[samples]`.

    Example:
      >>> import jax.numpy as jnp
      >>> bases = cluster_subspaces(jnp.eye(4), jnp.array([0, 0, 1, 1]), 2)
      >>> nearest_subspace(jnp.array([[0.0, 0.1, 0.0, 2.0], [1.0, 2.0, 0.5, 0.0]]), bases)
      Array([1, 0], dtype=int32)
    """
    rows = normalize_rows(jnp.asarray(features))
    inside = [jnp.sum(jnp.square(wide_matmul(rows, basis)), axis=-1) for basis in subspaces]
    return jnp.argmax(jnp.stack(inside), axis=0).astype(jnp.int32)
