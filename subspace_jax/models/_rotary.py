"""Rotary position embedding, rotating halves."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_tables(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Returns sines and cosines of the rotation angles `position * base^(-2 i / head_dim)`.

    Args:
        positions: `[batch, length]` integers.
        head_dim: even size of a head.
        base: of the geometric series of frequencies.

    Returns:
        `(sin, cos)`, each `[batch, length, 1, head_dim / 2]` float32.

    Example:
        >>> import jax.numpy as jnp
        >>> sin, cos = rotary_tables(jnp.zeros((1, 3), jnp.int32), 8, 10000.0)
        >>> cos.shape, float(cos.min())
        ((1, 3, 1, 4), 1.0)
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def apply_rotary(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates the pairs `(x_i, x_{i + head_dim / 2})` by the tabled angles.

    Args:
        x: `[batch, length, heads, head_dim]`.
        sin: `[batch, length, 1, head_dim / 2]`.
        cos: as `sin`.

    Returns:
        The rotated `x`, its shape and dtype; rotated in float32.

    Source: Jianlin Su and others, "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Example:
        >>> import jax.numpy as jnp
        >>> sin, cos = rotary_tables(jnp.zeros((1, 1), jnp.int32), 2, 10000.0)
        >>> apply_rotary(jnp.array([[[[1.0, 2.0]]]]), sin, cos).tolist()
        [[[[1.0, 2.0]]]]
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
