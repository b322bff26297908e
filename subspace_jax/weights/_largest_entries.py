"""Finds the positions of the largest entries, exactly and in a few passes over the data."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def largest_entries(scores: jax.Array, count: int, *, axes: int = 1) -> jax.Array:
    r"""Returns the positions of the `count` largest scores; of equal ones the lower positions.

    Bisection on the bits of the scores finds the smallest that is taken, one pass per bit: a sort of all scores, of
    which most are thrown away, costs more. Matrices are not flattened for it, so that one that is split over devices
    both ways stays where it is: only counts and positions are sent.

    Args:
      scores: `[*stack, n]`, or `[*stack, m, n]` with `axes=2`; none negative, floating.
      count: at most \(n\), or \(m n\); a Python int.
      axes: 2 to count the entries of matrices, row by row.

    Returns:
      `[*stack, count]` int32, ascending.

    Raises:
      ValueError: `count` is negative or above the number of scores.

    Example:
      >>> import jax.numpy as jnp
      >>> largest_entries(jnp.array([0.5, 3.0, 0.5, 2.0]), 3).tolist()
      [0, 1, 3]
    """
    if axes == 1:
        scores = scores[..., None, :]
    size = scores.shape[-2] * scores.shape[-1]
    if not 0 <= count <= size:
        raise ValueError(f"largest_entries: count={count} of {size} scores; expected at least 0 and at most {size}.")
    return _largest(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), count)


# One compiled program per shape and count: outside jit the loops would be compiled anew by every call.
@functools.partial(jax.jit, static_argnames="count")
def _largest(scores: jax.Array, count: int) -> jax.Array:
    width = 8 * scores.dtype.itemsize
    # Non-negative floats are ordered as their bits are.
    bits = lax.bitcast_convert_type(jnp.abs(scores), jnp.int64 if width == 64 else jnp.int32)

    def of_one(bits: jax.Array) -> jax.Array:
        def narrow(step: jax.Array, found: jax.Array) -> jax.Array:
            tried = found | (jnp.ones((), bits.dtype) << (width - 2 - step).astype(bits.dtype))
            return jnp.where(jnp.sum(bits >= tried) >= count, tried, found)

        last = lax.fori_loop(0, width - 1, narrow, jnp.zeros((), bits.dtype))
        above, equal = bits > last, bits == last
        in_row, before = _running_counts(equal)
        return _positions(above | (equal & (before[:, None] + in_row <= count - jnp.sum(above))), count)

    return jnp.vectorize(of_one, signature="(m,n)->(k)")(bits)


def _running_counts(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flags up to each entry in its row, `[m, n]`, and those in the rows before, `[m]`; int32."""
    in_row = jnp.cumsum(flags, axis=1, dtype=jnp.int32)
    return in_row, jnp.cumsum(in_row[:, -1]) - in_row[:, -1]


def _positions(flags: jax.Array, count: int) -> jax.Array:
    """The positions of `count` flags of a matrix row by row, each found by bisection in the running counts."""
    height, width = flags.shape
    in_row, before = _running_counts(flags)
    number = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(before + in_row[:, -1], number, side="right").astype(jnp.int32)
    row = jnp.minimum(row, height - 1)
    rank = number - before[row]

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        beyond = in_row[row, middle] <= rank
        return jnp.where(beyond, middle + 1, low), jnp.where(beyond, high, middle)

    ends = jnp.zeros_like(rank), jnp.full_like(rank, width - 1)
    column, _ = lax.fori_loop(0, max(width - 1, 0).bit_length(), halve, ends)
    return row * width + column
