"""The search for a learning rate whose best lies inside the grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Rates at which the search gives up.
MOST = 10


def widened(rates: Sequence[float], score: Callable[[float], float]) -> dict[float, float]:
    """Tries learning rates, and more beyond an edge of the grid while the best lies there, up to ten in all.

    Args:
      rates: the first ones, of the grid 1, 3, 10, 30, ... that the others are of too.
      score: tells how good a rate is, higher is better; not a number is worst.

    Returns:
      Score by rate, in the order in which they were tried.

    Example:
      >>> list(widened((1e-3, 3e-3, 1e-2), lambda rate: -abs(rate - 0.05)))
      [0.001, 0.003, 0.01, 0.03, 0.1]
    """
    found: dict[float, float] = {}

    def attempt(rate: float) -> None:
        value = score(rate)
        found[rate] = value if math.isfinite(value) else -math.inf

    for rate in rates:
        attempt(rate)
    while len(found) < MOST:
        best = max(found, key=lambda rate: found[rate])
        if best == max(found):
            attempt(_beside(best, up=True))
        elif best == min(found):
            attempt(_beside(best, up=False))
        else:
            break
    return found


def _beside(rate: float, up: bool) -> float:
    """The next rate of the grid 1, 3, 10, 30, ..."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    is_three = rate / 10.0**exponent > 2.0
    if up:
        return float(f"1e{exponent + 1}" if is_three else f"3e{exponent}")
    return float(f"1e{exponent}" if is_three else f"3e{exponent - 1}")
