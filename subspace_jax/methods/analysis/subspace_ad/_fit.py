"""The subspace of normal patches: principal components that hold a share of their variance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_int, check_number

from ._moments import Moments, add_patches, no_moments

# Variances below this share of the largest are rounding of the products they were summed from, by width of the float.
_FLOOR = {4: 1e-6, 8: 1e-12}
# A cumulative share may miss its own total by rounding.
_ROUNDING = 1e-13


class PatchSubspace(NamedTuple):
    r"""An affine subspace \(\mu + \mathrm{span}(C)\) of features, and how much varies along it.

    Attributes:
      mean: \(\mu\), `[features]`.
      components: \(C\), orthonormal columns, `[features, rank]`.
      variances: all eigenvalues of the covariance, descending, zero where they are rounding, `[features]`.
      count: number of patches that it was fitted to.
    """

    mean: jax.Array
    components: jax.Array
    variances: jax.Array
    count: jax.Array


def fit_subspace(
    patches: Moments | jax.Array | Iterable[Any], *, tau: float = 0.99, rank: int | None = None
) -> PatchSubspace:
    r"""Fits the principal subspace of normal patches: no training, one pass over the data.

    \(\Sigma = \frac{1}{T - 1} \sum_p (x_p - \mu)(x_p - \mu)^T\); the rank is the smallest \(r\) with
    \(\sum_{j \le r} l_j \ge \tau \sum_j l_j\). The eigenvectors are computed on the host in float64, since the rank
    is a number and not an array. Fitted to an unlabeled test set in place of normal images it is the batched
    zero-shot mode of the publication.

    Args:
      patches: features `[..., features]`, an iterable of such batches (read once, one in memory at a time), or
        `Moments` that were gathered already.
      tau: share of the variance that the subspace holds, in (0, 1].
      rank: a fixed number of components in place of `tau`.

    Returns:
      The subspace, in float32, or float64 for features in that.

    Raises:
      ValueError: fewer than two patches, features that are not finite, or `tau` out of its range.
      RankError: `rank` is negative or above the number of features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> line = jnp.linspace(-1, 1, 50)[:, None] * jnp.array([3.0, 4.0, 0.0]) + 1
      >>> fit_subspace(line).components.shape
      (3, 1)
    """
    check_number("fit_subspace: tau", tau, above=0.0, most=1.0)
    moments = patches if isinstance(patches, Moments) else _gather(patches)
    width = moments.mean.shape[-1]
    if rank is not None:
        rank = check_int("fit_subspace: rank", rank, 0, width)
    if int(moments.count) < 2:
        raise ValueError(f"fit_subspace: {int(moments.count)} patches; expected at least 2 to have a covariance.")
    covariance = np.asarray(moments.scatter, np.float64) / (int(moments.count) - 1)
    if not (np.isfinite(covariance).all() and np.isfinite(np.asarray(moments.mean)).all()):
        raise ValueError("fit_subspace: the features hold NaN or infinity; look at the images and the backbone.")
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    dtype = moments.mean.dtype
    values = np.where(values > _FLOOR[dtype.itemsize] * max(values[0], 0.0), values, 0.0)
    chosen = needed_rank(values, tau) if rank is None else rank
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    vectors = vectors * np.where(largest < 0, -1.0, 1.0)
    return PatchSubspace(
        moments.mean, jnp.asarray(vectors[:, :chosen], dtype), jnp.asarray(values, dtype), moments.count
    )


def _gather(patches: Any) -> Moments:
    batches = [patches] if hasattr(patches, "shape") else patches
    moments = None
    for batch in batches:
        batch = jnp.asarray(batch)
        if batch.ndim < 2 or not jnp.issubdtype(batch.dtype, jnp.floating):
            raise ValueError(f"fit_subspace: {batch.dtype}{batch.shape}; expected real features [..., features].")
        if moments is None:
            moments = no_moments(batch.shape[-1], batch.dtype)
        if batch.shape[-1] != moments.mean.shape[-1]:
            raise ValueError(
                f"fit_subspace: a batch has {batch.shape[-1]} features, those before {moments.mean.shape[-1]}."
            )
        if batch.size:
            moments = add_patches(moments, batch)
    if moments is None:
        raise ValueError("fit_subspace: no batch came; an iterator that was read before is empty.")
    return moments


def needed_rank(variances: Any, tau: float = 0.99) -> int:
    """Returns the smallest number of leading variances whose sum reaches a share of all.

    Args:
      variances: `[features]`, descending and not negative.
      tau: the share, in (0, 1].

    Returns:
      At most the number of variances above zero; 0 if there is none.

    Example:
      >>> needed_rank([6.0, 3.0, 1.0, 0.0], 0.9)
      2
    """
    found = np.asarray(variances, np.float64)
    total = found.sum()
    if total <= 0:
        return 0
    reached = np.cumsum(found) >= tau * (1 - _ROUNDING) * total
    return min(int(np.argmax(reached)) + 1, int(np.count_nonzero(found)))
