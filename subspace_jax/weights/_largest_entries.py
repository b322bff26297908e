"""The positions of the largest entries, exactly and in a few passes over the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def largest_entries(scores: jax.Array, count: int) -> jax.Array:
    r"""Returns the positions of the `count` largest scores; of equal ones the lower positions.

    Bisection on the bits of the scores finds the smallest that is taken, one pass per bit: a sort of all scores, of
    which most are thrown away, costs more.

    Args:
      scores: `[*stack, n]`, none negative, floating.
      count: at most \(n\); a Python int.

    Returns:
      `[*stack, count]` int32, ascending.

    Raises:
      ValueError: `count` is not between 0 and \(n\).

    Example:
      >>> import jax.numpy as jnp
      >>> largest_entries(jnp.array([0.5, 3.0, 0.5, 2.0]), 3).tolist()
      [0, 1, 3]
    """
    size = scores.shape[-1]
    if not 0 <= count <= size:
        raise ValueError(f"largest_entries: count={count} of {size} scores; expected at least 0 and at most {size}.")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    width = 8 * scores.dtype.itemsize
    # Non-negative floats are ordered as their bits are.
    bits = lax.bitcast_convert_type(jnp.abs(scores), jnp.int64 if width == 64 else jnp.int32)

    def of_one(bits: jax.Array) -> jax.Array:
        def narrow(step: jax.Array, found: jax.Array) -> jax.Array:
            tried = found | (jnp.ones((), bits.dtype) << (width - 2 - step).astype(bits.dtype))
            return jnp.where(jnp.sum(bits >= tried) >= count, tried, found)

        last = lax.fori_loop(0, width - 1, narrow, jnp.zeros((), bits.dtype))
        above, equal = bits > last, bits == last
        taken = above | (equal & (jnp.cumsum(equal) <= count - jnp.sum(above)))
        return jnp.nonzero(taken, size=count)[0].astype(jnp.int32)

    return jnp.vectorize(of_one, signature="(n)->(k)")(bits)
