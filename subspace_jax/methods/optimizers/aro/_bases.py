"""Rules of normed steepest descent, which ARO runs in rotated coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import check_choice, check_int

Base = Literal["sinkhorn", "row", "sign", "adam"]

# What is smaller than this share of the largest is rounding, which a norm of one would make as large as the rest.
FLOOR = 1e-6


def sinkhorn(matrix: jax.Array, passes: int = 5, *, simultaneous: bool = False) -> jax.Array:
    r"""Scales rows to norm \(\sqrt n\) and columns to norm \(\sqrt m\), again and again in turn.

    Args:
      matrix: `[*stack, m, n]`.
      passes: of rows and columns each.
      simultaneous: scale both sides by norms of the same matrix instead, as one reading of the publication has it: the
        same in the limit up to a factor, slower.

    Example:
      >>> import jax.numpy as jnp
      >>> jnp.linalg.norm(sinkhorn(jnp.array([[1.0, 2.0], [3.0, 4.0]])), axis=0).round(3)
      Array([1.414, 1.414], dtype=float32)
    """
    check_int("sinkhorn: passes", passes)
    m, n = matrix.shape[-2:]
    x = without_noise(matrix)
    for _ in range(passes):
        rows = _inverse(jnp.linalg.norm(x, axis=-1, keepdims=True))
        if simultaneous:
            x = x * (math.sqrt(n) * rows) * (math.sqrt(m) * _inverse(jnp.linalg.norm(x, axis=-2, keepdims=True)))
            continue
        x = math.sqrt(n) * rows * x
        x = math.sqrt(m) * _inverse(jnp.linalg.norm(x, axis=-2, keepdims=True)) * x
    return x


def normalized_rows(matrix: jax.Array) -> jax.Array:
    r"""Scales every row to norm \(\sqrt n\).

    Args:
      matrix: `[*stack, m, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> jnp.linalg.norm(normalized_rows(jnp.array([[3.0, 4.0], [0.0, 1.0]])), axis=1).round(3)
      Array([1.414, 1.414], dtype=float32)
    """
    x = without_noise(matrix)
    return math.sqrt(x.shape[-1]) * _inverse(jnp.linalg.norm(x, axis=-1, keepdims=True)) * x


def signs(matrix: jax.Array) -> jax.Array:
    """Returns the sign of every entry that is more than rounding."""
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return jnp.where(jnp.abs(matrix) > FLOOR * largest, jnp.sign(matrix), 0.0)


def without_noise(matrix: jax.Array) -> jax.Array:
    """Sets rows and columns to zero that are rounding beside the largest one.

    Args:
      matrix: `[*stack, m, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> without_noise(jnp.array([[1.0, 1e-9], [1.0, 1e-9]])).tolist()
      [[1.0, 0.0], [1.0, 0.0]]
    """
    for axis in (-1, -2):
        norms = jnp.linalg.norm(matrix, axis=axis, keepdims=True)
        matrix = jnp.where(norms > FLOOR * jnp.max(norms, axis=(-2, -1), keepdims=True), matrix, 0.0)
    return matrix


def stateless(base: Base, passes: int, simultaneous: bool) -> Callable[[jax.Array], jax.Array]:
    """Returns the rule of a name, other than Adam's."""
    check_choice("scale_by_aro: base", base, ("sinkhorn", "row", "sign", "adam"))
    if base == "sinkhorn":
        return lambda matrix: sinkhorn(matrix, passes, simultaneous=simultaneous)
    return normalized_rows if base == "row" else signs


def _inverse(norms: jax.Array) -> jax.Array:
    """One by the norms, zero where they are."""
    return jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)
