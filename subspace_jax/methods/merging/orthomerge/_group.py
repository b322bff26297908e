"""Rotations and their skew-symmetric coordinates, and the mean of several of them."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.linalg import cayley, whole_matrices, wide_matmul

Aggregate = Literal["mean", "median", "max"]
TINY = 1e-8
# Coordinates beyond this are of half turns, which have none; what is left of them goes to the residual.
HALF_TURN = 1e4


def to_group(skew: jax.Array) -> jax.Array:
    r"""Returns the rotations \((I - A)^{-1} (I + A)\) of skew-symmetric matrices.

    Args:
      skew: \(A\), `[*stack, n, n]`.

    Returns:
      `[*stack, n, n]`, of determinant 1.

    Example:
      >>> import jax.numpy as jnp
      >>> to_group(jnp.array([[0.0, -1.0], [1.0, 0.0]])).round(4).tolist()
      [[0.0, -1.0], [1.0, 0.0]]
    """
    return cayley(skew)


def to_algebra(rotation: jax.Array) -> jax.Array:
    r"""Returns the skew-symmetric \(A = (R + I)^{-1} (R - I)\) of rotations; `to_group` is its inverse.

    A turn by a half has no such coordinate. Its plane gets zero, as if it were not turned.

    Args:
      rotation: \(R\), `[*stack, n, n]`, of determinant 1.

    Returns:
      `[*stack, n, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> to_algebra(jnp.array([[0.0, -1.0], [1.0, 0.0]])).round(4).tolist()
      [[0.0, -1.0], [1.0, 0.0]]
    """
    eye = jnp.eye(rotation.shape[-1], dtype=rotation.dtype)
    transposed = jnp.swapaxes(rotation, -1, -2)
    found = skew_part(jnp.linalg.solve(rotation + eye, rotation - eye))
    # The same by a symmetric system, which can be kept away from singular.
    gram = 2 * eye + rotation + transposed
    bounded = skew_part(jnp.linalg.solve(gram + 1e-6 * eye, rotation - transposed))
    usable = jnp.all(jnp.isfinite(found) & (jnp.abs(found) < HALF_TURN), axis=(-2, -1), keepdims=True)
    return jnp.where(usable, found, bounded)


def skew_part(matrix: jax.Array) -> jax.Array:
    """Returns the skew-symmetric part of stacked matrices."""
    return (matrix - jnp.swapaxes(matrix, -1, -2)) / 2


def scaled_mean(total: jax.Array, lengths: jax.Array, aggregate: Aggregate, axes: tuple[int, ...]) -> jax.Array:
    r"""Returns \(\bar\theta\,S / \|S\|\): the direction of a sum at the mean length of its terms.

    Args:
      total: \(S\).
      lengths: those of the terms, `[terms, *stack]`.
      aggregate: how they become one length.
      axes: axes of `total` that its length is taken over.
    """
    length = {"mean": jnp.mean, "median": jnp.median, "max": jnp.max}[aggregate](lengths, axis=0)
    norm = jnp.sqrt(jnp.sum(total * total, axis=axes, keepdims=True))
    factor = jnp.where(norm < TINY, 0.0, length.reshape(norm.shape) / jnp.maximum(norm, TINY))
    return factor * total


@functools.partial(jax.jit, static_argnames="tolerance")
def procrustes(target: jax.Array, matrix: jax.Array, tolerance: float = 1e-6) -> jax.Array:
    r"""Returns the rotations \(R\) that bring matrices nearest to targets: \(\arg\min \|R W - T\|_F\).

    \(R = U V^T\) of \(T W^T = U S V^T\). Where \(W\) does not say how to turn, on the null space of \(T W^T\), the
    rotation is the one nearest to the identity; and of reflections the nearest rotation is taken.

    Args:
      target: \(T\), `[*stack, n, m]`.
      matrix: \(W\), likewise.
      tolerance: singular values at most this share of the largest are zero.

    Returns:
      `[*stack, n, n]`, of determinant 1.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0], [0.0]])
      >>> procrustes(jnp.array([[0.0], [2.0]]), w).round(4).tolist()
      [[0.0, -1.0], [1.0, 0.0]]
    """
    product = wide_matmul(whole_matrices(target), jnp.swapaxes(whole_matrices(matrix), -1, -2))
    u, s, vt = jnp.linalg.svd(product, full_matrices=False)
    null = s <= tolerance * jnp.max(s, axis=-1, keepdims=True)
    both = (null[..., :, None] & null[..., None, :]).astype(s.dtype)
    # One square problem for both parts. The kept one has 2 on its diagonal: no value of the other part exceeds 1.
    kept = 2 * (1 - null.astype(s.dtype))[..., None] * jnp.eye(s.shape[-1], dtype=s.dtype)
    p, _, qt = jnp.linalg.svd(both * wide_matmul(vt, u) + kept, full_matrices=False)
    q = jnp.swapaxes(qt, -1, -2)
    turn = wide_matmul(wide_matmul(u, wide_matmul(q, jnp.swapaxes(p, -1, -2))), vt)
    mirrored = jnp.linalg.slogdet(turn)[0] < 0
    some = jnp.any(null, axis=-1)
    q = _flip_last(q, mirrored & some)
    u = _flip_last(u, mirrored & ~some)
    return wide_matmul(wide_matmul(u, wide_matmul(q, jnp.swapaxes(p, -1, -2))), vt)


def _flip_last(columns: jax.Array, when: jax.Array) -> jax.Array:
    return columns.at[..., -1].multiply(jnp.where(when, -1.0, 1.0)[..., None].astype(columns.dtype))
