"""Rotary position embedding, rotating halves."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ._config import require_choice


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads longer texts than it was trained on.

    `"linear"` divides all by `factor`. `"llama3"` leaves those that turn more than `high` times within the `original`
    length, divides those that turn less than `low` times, and goes from one to the other in between.

    Attributes:
        kind: `"linear"` or `"llama3"`.
        factor: of the length.
        low: turns within the original length below which a frequency is divided.
        high: turns above which it is left.
        original: length that the model was trained on first.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):
        require_choice("RopeScaling", "kind", self.kind, ("linear", "llama3"))

    def scale(self, frequencies: jax.Array) -> jax.Array:
        """Returns the changed frequencies."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary_tables(
    positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns sines and cosines of the rotation angles `position * base^(-2 i / head_dim)`.

    Args:
        positions: `[batch, length]` integers.
        head_dim: even size of a head.
        base: of the geometric series of frequencies.
        scaling: how these are changed; None leaves them.

    Returns:
        `(sin, cos)`, each `[batch, length, 1, head_dim / 2]` float32.

    Example:
        >>> import jax.numpy as jnp
        >>> sin, cos = rotary_tables(jnp.zeros((1, 3), jnp.int32), 8, 10000.0)
        >>> cos.shape, float(cos.min())
        ((1, 3, 1, 4), 1.0)
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.sin(angles), jnp.cos(angles)


@functools.partial(jax.jit, inline=True)
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
