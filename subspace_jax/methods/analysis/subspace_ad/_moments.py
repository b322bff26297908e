"""Mean and scatter of patch features, one batch in memory at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import wide_dtype, wide_matmul


class Moments(NamedTuple):
    """What a fit needs of all patches seen so far; two of them merge, so that hosts and folds may count alone.

    Attributes:
      count: number of patches, int32 scalar.
      mean: their mean, `[features]`.
      scatter: the sum of outer products of what differs from the mean, `[features, features]`.
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


def no_moments(width: int, dtype: jnp.dtype | type = jnp.float32) -> Moments:
    """Returns the moments of no patch at all, in float32 or, for float64, in that.

    Args:
      width: number of features.
      dtype: of the features.

    Example:
      >>> no_moments(3).scatter.shape
      (3, 3)
    """
    wide = wide_dtype(dtype)
    return Moments(jnp.zeros((), jnp.int32), jnp.zeros(width, wide), jnp.zeros((width, width), wide))


@jax.jit
def add_patches(moments: Moments, features: jax.Array) -> Moments:
    r"""Updates mean and scatter of patch features with one batch, centered by its own mean before it is squared.

    A sum of squares minus the square of a sum would cancel; merging centered batches does not, and it reads the data
    once, so that mean and covariance come from the same augmented images whatever the batches are.

    Args:
      moments: of the patches before.
      features: `[..., features]`, all leading axes count patches.

    Returns:
      The moments of both.

    Example:
      >>> import jax.numpy as jnp
      >>> add_patches(no_moments(1), jnp.array([[1.0], [3.0]])).scatter
      Array([[2.]], dtype=float32)
    """
    rows = features.reshape(-1, features.shape[-1]).astype(moments.mean.dtype)
    mean = jnp.mean(rows, axis=0)
    centered = rows - mean
    count = jnp.asarray(rows.shape[0], jnp.int32)
    return merge_moments(moments, Moments(count, mean, wide_matmul(centered.T, centered)))


@jax.jit
def merge_moments(one: Moments, other: Moments) -> Moments:
    r"""Returns the moments of the patches of both: \(S_1 + S_2 + \frac{n_1 n_2}{n_1 + n_2} d d^T\), \(d = m_2 - m_1\).

    Args:
      one: moments.
      other: moments of the same width; their order does not matter.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = (add_patches(no_moments(1), jnp.array([[x]])) for x in (1.0, 3.0))
      >>> merge_moments(a, b).mean
      Array([2.], dtype=float32)
    """
    wide = one.mean.dtype
    n_one, n_other = one.count.astype(wide), other.count.astype(wide)
    share = n_other / jnp.maximum(n_one + n_other, 1)
    apart = other.mean - one.mean
    scatter = one.scatter + other.scatter + n_one * share * jnp.outer(apart, apart)
    return Moments(one.count + other.count, one.mean + share * apart, scatter)
