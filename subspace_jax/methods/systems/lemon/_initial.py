"""Initial states: sums of sines between 0 and 1, and Riemann data."""

from __future__ import annotations

import numpy as np


def sine_sums(rng: np.random.Generator, count: int, x: np.ndarray, length: float, largest: int) -> np.ndarray:
    r"""Draws states: one or two sines of wave numbers up to 2 or 4, brought to minimum 0 and maximum 1.

    The slope from end to end is removed first; one in ten takes absolute values, one in ten is windowed. Modes are
    drawn with replacement, so that at least one is always there.

    Args:
      rng: of all draws.
      count: of states.
      x: cell centers.
      length: of the domain.
      largest: wave number.

    Returns:
      `[count, points]`.
    """
    found = []
    while len(found) < count:
        numbers = rng.integers(1, largest + 1, rng.integers(1, 3))
        heights, phases = rng.uniform(0, 1, len(numbers)), rng.uniform(0, 2 * np.pi, len(numbers))
        u = (heights[:, None] * np.sin(2 * np.pi * numbers[:, None] * x / length + phases[:, None])).sum(0)
        if rng.random() < 0.1:
            u = np.abs(u)
        if rng.random() < 0.1:
            start = rng.uniform(0.1, 0.45) * length
            u = u * ((x >= start) & (x <= length - start))
        u = u - (u[0] + (u[-1] - u[0]) * (x - x[0]) / (x[-1] - x[0]))
        if np.ptp(u) > 1e-3:  # what cancels or was windowed away is drawn anew
            found.append((u - u.min()) / np.ptp(u))
    return np.stack(found)


def riemann_states(rng: np.random.Generator, count: int, x: np.ndarray, length: float) -> np.ndarray:
    """Draws states of two values: of the two jumps of the periodic line one is a shock, the other a rarefaction.

    Args:
      rng: of all draws.
      count: of states.
      x: cell centers.
      length: of the domain.

    Returns:
      `[count, points]`, values between 0 and 1.
    """
    low, gap = rng.uniform(0, 0.4, (count, 1)), rng.uniform(0.2, 0.6, (count, 1))
    start, width = rng.uniform(0, length, (count, 1)), rng.uniform(0.25, 0.75, (count, 1)) * length
    return low + gap * ((x - start) % length < width)
