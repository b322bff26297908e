"""Chooses how many terms of a decomposition to keep, from its singular values."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Combine = Literal["min", "max", "energy", "elbow"]


def energy_terms(
    values: Float[Array, "*stack k"], share: float, total: Float[Array, " *stack"] | None = None
) -> Int[Array, " *stack"]:
    r"""Counts the leading terms that hold a share \(\tau\) of the energy.

    That is the smallest \(r\) with \(\sum_{c \le r} s_c^2 \ge \tau \sum_c s_c^2\).

    Args:
      values: \(s\), `[*stack, k]`, largest first.
      share: \(\tau\), from 0 to 1.
      total: the whole energy `[*stack]`, where `values` are only the leading ones.

    Returns:
      `[*stack]` int32, from 1 to `k`.

    Example:
      >>> import jax.numpy as jnp
      >>> int(energy_terms(jnp.array([3.0, 2.0, 1.0]), 0.9))
      2
    """
    energy = jnp.cumsum(values**2, axis=-1)
    whole = energy[..., -1] if total is None else jnp.maximum(total, energy[..., -1])
    # With room for rounding where all of it is asked for.
    enough = energy >= (share - 1e-6) * whole[..., None]
    return jnp.where(enough.any(axis=-1), jnp.argmax(enough, axis=-1) + 1, values.shape[-1]).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)
def elbow_terms(values: Float[Array, "*stack k"], count: Int[Array, " *stack"] | None = None) -> Int[Array, " *stack"]:
    r"""Returns the number of terms before the elbow of the spectrum.

    The elbow is the value farthest below the chord from the first to the last: with \(x_c = (c - 1) / (K - 1)\) and
    \(y_c = (s_c - s_K) / (s_1 - s_K)\), the largest \(1 - x_c - y_c\). A flat spectrum has none and keeps all terms.

    Args:
      values: \(s\), `[*stack, k]`, largest first.
      count: \(K\), how many leading values count, `[*stack]`; all if None.

    Returns:
      `[*stack]` int32, from 1 to `k`.

    Example:
      >>> import jax.numpy as jnp
      >>> int(elbow_terms(jnp.array([10.0, 9.0, 8.0] + 61 * [0.1])))
      3
    """
    size = values.shape[-1]
    last_place = jnp.broadcast_to(jnp.asarray(size if count is None else count, jnp.int32), values.shape[:-1])
    first = values[..., 0]
    last = jnp.take_along_axis(values, jnp.maximum(last_place - 1, 0)[..., None], axis=-1)[..., 0]
    fall = first - last
    flat = (fall <= 1e-6 * jnp.abs(first)) | (last_place <= 1)
    place = jnp.arange(size)
    x = place / jnp.maximum(last_place - 1, 1)[..., None]
    y = (values - last[..., None]) / jnp.where(flat, 1.0, fall)[..., None]
    below = jnp.where(place < last_place[..., None], 1.0 - x - y, -jnp.inf)
    # The elbow is the first value that is not wanted any more.
    before = jnp.maximum(jnp.argmax(below, axis=-1), 1)
    return jnp.where(flat, last_place, before).astype(jnp.int32)


def count_terms(
    values: Float[Array, "*stack k"],
    share: float,
    combine: Combine = "min",
    *,
    least: int = 1,
    most: int | None = None,
    total: Float[Array, " *stack"] | None = None,
    count: Int[Array, " *stack"] | None = None,
) -> Int[Array, " *stack"]:
    """Returns how many terms to keep by the energy and the elbow criterion, within bounds.

    Args:
      values: singular values `[*stack, k]`, largest first.
      share: of the sum of squares that the terms hold at least.
      combine: "min" and "max" of both criteria, or one of them alone.
      least: at least so many.
      most: at most so many.
      total: sum of squares where `values` are not all, `[*stack]`.
      count: number of values that count, the others being padding, `[*stack]`; all if None.

    Returns:
      `[*stack]` int32.

    Example:
      >>> import jax.numpy as jnp
      >>> int(count_terms(jnp.array([10.0, 9.0, 8.0] + 61 * [0.1]), 0.5))
      2
    """
    energy, elbow = energy_terms(values, share, total), elbow_terms(values, count)
    kept = {
        "energy": energy,
        "elbow": elbow,
        "min": jnp.minimum(energy, elbow),
        "max": jnp.maximum(energy, elbow),
    }[combine]
    return jnp.clip(kept, least, values.shape[-1] if most is None else most)


def allocate_terms(
    spectra: Sequence[Float[np.ndarray, "... _"]], costs: Sequence[int], budget: int, *, least: int, most: int
) -> list[Int[np.ndarray, " ..."]]:
    r"""Allocates a budget of values that several matrices share, and returns the number of terms of each.

    After `least` terms each, the term with the most energy for its cost, \(s_c^2\) per value, comes next, until one
    does not fit. A cheaper one behind it is not taken: so the terms of a smaller budget are among those of a larger.

    Args:
      spectra: singular values `[*stack, k]` of each kind of matrix, largest first, on the host.
      costs: values of one term of each kind.
      budget: values of all terms together; what `least` terms cost is there in any case.
      least: at least so many terms of every matrix.
      most: at most so many.

    Returns:
      `[*stack]` for each kind.

    Example:
      >>> import numpy as np
      >>> steep, flat = np.array([9.0, 1.0, 0.5]), np.array([5.0, 4.0, 3.0])
      >>> [int(n) for n in allocate_terms([steep, flat], [1, 1], 4, least=1, most=3)]
      [1, 3]
    """
    rows = [s.reshape(-1, s.shape[-1]) for s in spectra]
    kept = [np.full(len(s), least) for s in rows]
    left = budget - sum(len(s) * least * cost for s, cost in zip(rows, costs, strict=True))
    queue: list[tuple[float, int, int]] = []

    def offer(kind: int, layer: int) -> None:
        place = kept[kind][layer]
        if place < min(most, rows[kind].shape[-1]):
            heapq.heappush(queue, (-(float(rows[kind][layer, place]) ** 2) / costs[kind], kind, layer))

    for kind, layers in enumerate(rows):
        for layer in range(len(layers)):
            offer(kind, layer)
    while queue:
        _, kind, layer = heapq.heappop(queue)
        if costs[kind] > left:
            break
        left -= costs[kind]
        kept[kind][layer] += 1
        offer(kind, layer)
    return [k.reshape(s.shape[:-1]) for k, s in zip(kept, spectra, strict=True)]
