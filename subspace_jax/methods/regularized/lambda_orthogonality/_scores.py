r"""Scores of how well new representations find old ones.

\(C\) is `[models, models]`: `C[t, k]` is a retrieval score of model `t`'s queries in model `k`'s gallery, for `t >= k`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _lower(matrix: Any) -> jax.Array:
    matrix = jnp.asarray(matrix, jnp.promote_types(jnp.asarray(matrix).dtype, jnp.float32))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ValueError(f"The compatibility matrix has shape {matrix.shape}; expected [models, models].")
    return matrix


def is_compatible(matrix: Any) -> jax.Array:
    """Tells which newer models find more in an older gallery than its own model does: `C[t, k] > C[k, k]`.

    Args:
      matrix: the compatibility matrix, lower triangle needed.

    Returns:
      Booleans `[models, models]`, False on and above the diagonal.

    References:
      Shen, Xiong, Xia, Soatto, Towards Backward-Compatible Representation Learning, 2020.
    """
    matrix = _lower(matrix)
    return jnp.tril(matrix > jnp.diagonal(matrix)[None, :], -1)


def average_compatibility(matrix: Any) -> jax.Array:
    """Returns the share of pairs of models that are compatible; 1 for a single model.

    Args:
      matrix: the compatibility matrix, lower triangle needed.

    Example:
      >>> float(average_compatibility([[0.5, 0.0], [0.6, 0.8]]))
      1.0

    References:
      Biondi, Pernici, Bruni, Del Bimbo, CoReS: Compatible Representations via Stationarity, 2021.
    """
    matrix = _lower(matrix)
    pairs = len(matrix) * (len(matrix) - 1) / 2
    return jnp.sum(is_compatible(matrix)) / pairs if pairs else jnp.ones(())


def average_multimodel_score(matrix: Any) -> jax.Array:
    """Returns the mean of the lower triangle with its diagonal.

    Args:
      matrix: the compatibility matrix, lower triangle needed.
    """
    matrix = _lower(matrix)
    lower = jnp.tril(jnp.ones_like(matrix))
    return jnp.sum(jnp.where(lower > 0, matrix, 0.0)) / jnp.sum(lower)


def update_gain(matrix: Any, new: int, old: int) -> jax.Array:
    r"""Returns the share of a model's gain that needs no new gallery: \((C_{t,k} - C_{k,k}) / (C_{t,t} - C_{k,k})\).

    Args:
      matrix: the compatibility matrix.
      new: \(t\).
      old: \(k\).

    Returns:
      A scalar; NaN where the new model is no better than the old one.
    """
    matrix = _lower(matrix)
    possible = matrix[new, new] - matrix[old, old]
    gain = (matrix[new, old] - matrix[old, old]) / jnp.where(possible > 0, possible, 1.0)
    return jnp.where(possible > 0, gain, jnp.nan)


def backfilling_score(curve: Any) -> jax.Array:
    """Returns the area under scores at equal steps of the share of the gallery that has new features.

    Args:
      curve: scores from share 0 to share 1, `[points]`, at least two.

    Raises:
      ValueError: `curve` is not one-dimensional, or has fewer than two points.

    References:
      Jaeckle, Faghri, Farhadi, Tuzel, Pouransari, FastFill: Efficient Compatible Model Update, 2023.
    """
    curve = jnp.asarray(curve, jnp.float32)
    if curve.ndim != 1 or len(curve) < 2:
        raise ValueError(f"backfilling_score: scores of shape {curve.shape}; expected those at two shares at least.")
    return jnp.trapezoid(curve, dx=1.0 / (len(curve) - 1))
