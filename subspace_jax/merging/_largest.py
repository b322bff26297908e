"""The k-th smallest magnitude over all leaves of a tree, exact, by counting in passes that hold one leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_DIGIT = 16  # bits counted in one pass


def kth_magnitude(leaves: Callable[[], Iterable[jax.Array]], place: int) -> Any:
    """Returns the k-th smallest magnitude among all entries of several arrays, exactly.

    The bits of a non-negative number are ordered as the number is. Each pass counts the next 16 of them among the
    entries that agree in those found so far, so a float32 takes two passes, and no leaf is sorted or kept.

    Args:
      leaves: makes an iterator over arrays of one floating dtype; called once a pass, and once before.
      place: from 1 to the number of entries.

    Returns:
      A scalar of the arrays' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> float(kth_magnitude(lambda: iter([jnp.array([-3.0, 1.0]), jnp.array([2.0])]), 2))
      2.0
    """
    first = next(iter(leaves()))
    bits = first.dtype.itemsize * 8
    prefix: Any = 0
    left: Any = place
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        total: Any = 0
        for leaf in leaves():
            counts = _count(leaf, prefix, shift)
            # On the host the sum over a large tree does not overflow.
            total = total + (counts if isinstance(counts, Tracer) else np.asarray(counts, np.int64))
        numeric = jnp if isinstance(total, Tracer) else np
        below = numeric.cumsum(total)
        digit = numeric.sum(below < left)
        left = left - numeric.where(digit > 0, below[numeric.maximum(digit - 1, 0)], 0)
        prefix = _append(prefix, digit, bits)
    return jax.lax.bitcast_convert_type(jnp.asarray(prefix, f"uint{bits}"), first.dtype)


def _append(prefix: Any, digit: Any, bits: int) -> Any:
    if isinstance(digit, Tracer):
        return (jnp.asarray(prefix, f"uint{bits}") << _DIGIT) | digit.astype(f"uint{bits}")
    return (int(prefix) << _DIGIT) | int(digit)


def _count(leaf: jax.Array, prefix: Any, shift: int) -> jax.Array:
    return _counted(leaf, jnp.asarray(prefix, f"uint{leaf.dtype.itemsize * 8}"), shift)


@jax.jit
def _counted(leaf: jax.Array, prefix: jax.Array, shift: Any) -> jax.Array:
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(leaf), prefix.dtype).ravel()
    shifted = magnitude >> jnp.asarray(shift, prefix.dtype)
    # A shift by all bits is undefined, so it is done in two.
    agrees = (shifted >> (_DIGIT // 2)) >> (_DIGIT // 2) == prefix
    digit = (shifted & (2**_DIGIT - 1)).astype(jnp.int32)
    return jnp.zeros(2**_DIGIT, jnp.uint32).at[digit].add(agrees.astype(jnp.uint32))
