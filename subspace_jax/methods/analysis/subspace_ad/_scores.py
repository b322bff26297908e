"""Scores of patches: what a subspace of normal ones does not explain."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import check_choice, check_int
from subspace_jax.linalg import wide_matmul

from ._fit import PatchSubspace

PatchScore = Literal["residual", "mahalanobis", "euclidean", "cosine"]
_SCORES = ("residual", "mahalanobis", "euclidean", "cosine")
_DAMPING = 1e-6


def score_patches(
    subspace: PatchSubspace, features: jax.Array, *, score: PatchScore = "residual", drop: int = 0
) -> jax.Array:
    r"""Scores every patch by its squared distance to the subspace: \(\|(x - \mu) - C C^T (x - \mu)\|^2\).

    The other scores are there to compare with: with \(z = C^T (x - \mu)\), "mahalanobis" is
    \(\sum_j z_j^2 / (l_j + 10^{-6})\) and "euclidean" \(\|z\|^2\), both inside the subspace and blind to what lies
    outside; "cosine" is \(1 - \cos(x, \mu + C z)\).

    Args:
      subspace: of normal patches.
      features: `[..., features]`.
      score: which one; the publication's is "residual".
      drop: ignore this many leading components: their coordinates are set to zero.

    Returns:
      `[...]`, float32 or float64; larger is less normal.

    Raises:
      ValueError: the features have another width than the subspace's, or an unknown score.
      RankError: `drop` is negative or above the rank.

    Example:
      >>> import jax.numpy as jnp
      >>> plane = PatchSubspace(jnp.zeros(3), jnp.eye(3)[:, :2], jnp.array([2.0, 1.0, 0.0]), jnp.array(9))
      >>> score_patches(plane, jnp.array([[5.0, 1.0, 0.0], [0.0, 0.0, 3.0]]))
      Array([0., 9.], dtype=float32)
    """
    check_choice("score_patches: score", score, _SCORES)
    drop = check_int("score_patches: drop", drop, 0, subspace.components.shape[-1])
    features = jnp.asarray(features)
    width = subspace.mean.shape[-1]
    if features.ndim < 1 or features.shape[-1] != width:
        raise ValueError(
            f"score_patches: features {features.shape}; expected [..., {width}] as the subspace was fitted to: "
            "use the same backbone and layers."
        )
    return _score(subspace, features, score, drop)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _score(subspace: PatchSubspace, features: jax.Array, score: str, drop: int) -> jax.Array:
    dtype = subspace.mean.dtype
    rows = features.reshape(-1, features.shape[-1]).astype(dtype)
    centered = rows - subspace.mean
    components = subspace.components[:, drop:]
    coordinates = wide_matmul(centered, components)
    if score == "residual":
        found = jnp.sum(jnp.square(centered - wide_matmul(coordinates, components.T)), axis=-1)
    elif score == "mahalanobis":
        variances = subspace.variances[drop : subspace.components.shape[-1]]
        found = jnp.sum(jnp.square(coordinates) / (variances + _DAMPING), axis=-1)
    elif score == "euclidean":
        found = jnp.sum(jnp.square(coordinates), axis=-1)
    else:
        rebuilt = subspace.mean + wide_matmul(coordinates, components.T)
        lengths = jnp.linalg.norm(rows, axis=-1) * jnp.linalg.norm(rebuilt, axis=-1)
        found = 1 - jnp.sum(rows * rebuilt, axis=-1) / jnp.maximum(lengths, jnp.finfo(dtype).tiny)
    return found.reshape(features.shape[:-1])


def mask_background(scores: jax.Array, attention: jax.Array, share: float = 0.15) -> jax.Array:
    """Sets scores of the patches that get least attention to zero: the publication's optional foreground mask.

    Args:
      scores: `[..., patches]`.
      attention: `[..., heads, queries, patches]`, of register or class tokens to patches at one layer; the mean over
        heads and queries counts.
      share: quantile of the attention in each image; patches below it are background.

    Returns:
      `[..., patches]`.

    Raises:
      ValueError: shapes that do not fit, or a share outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> mask_background(jnp.ones(4), jnp.array([[[0.0, 1.0, 2.0, 3.0]]]), 0.5)
      Array([0., 0., 1., 1.], dtype=float32)
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"mask_background: share={share!r}; expected a quantile between 0 and 1.")
    if attention.shape[:-3] + attention.shape[-1:] != scores.shape:
        raise ValueError(
            f"mask_background: scores {scores.shape} and attention {attention.shape}; expected "
            "[..., patches] and [..., heads, queries, patches]."
        )
    seen = jnp.mean(attention.astype(scores.dtype), axis=(-3, -2))
    return jnp.where(seen >= jnp.quantile(seen, share, axis=-1, keepdims=True), scores, 0)
