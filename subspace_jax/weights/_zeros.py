"""Zeros that a compiler takes for data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import is_tracer


def hidden_zeros(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns zeros for a factor that starts there, made so that no compiler knows them to be zeros.

    Where a factor is made and used in one program, `jnp.zeros` is a constant in it. XLA's CPU compiler (jaxlib 0.10.2,
    and 0.12) reads uninitialized memory in a batched product with such a constant, or any other broadcast scalar, whose
    result goes into a fused sum: under `jax.vmap` a LoRA at its start then gave 1e12 and NaN in place of zero. An
    optimization barrier does not help, since it is taken out before. Zero times random numbers stays a computation,
    because a compiler may not assume that they are finite. Outside of a trace, where each operation is a program of its
    own, they are `jnp.zeros`.

    Args:
      key: a random key; the result does not depend on it.
      shape: shape of the result.
      dtype: dtype of the result.

    Example:
      >>> import jax
      >>> hidden_zeros(jax.random.key(0), (2, 3)).tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    zeros = jnp.zeros(tuple(shape), dtype)
    if not is_tracer(zeros) and not is_tracer(key):
        return zeros
    return (0.0 * jax.random.uniform(key, tuple(shape), jnp.float32)).astype(dtype)
