"""The budget of entries: how it shrinks from epoch to epoch, and how layers share it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from subspace_jax.core import check_int, check_number
from subspace_jax.methods.sparse.snell import Rule

# A product that is whole in decimals may be a little less in binary: (1 - 0.8) * 1000 is 199.99999999999994.
ROUNDING = 1e-6


def kept_entries(sparsity: float, size: int) -> int:
    r"""Returns \(\lfloor (1 - s)\,S \rfloor\) of the exact product.

    Example:
      >>> kept_entries(0.8, 1000)
      200
    """
    return math.floor((1.0 - sparsity) * size + ROUNDING)


def order_of(kept: int, size: int, rule: Rule) -> int:
    """Returns which magnitude is the threshold where so many entries stay; "hard" can keep all but one at most."""
    return max(size - kept, 1) if rule == "hard" else size - kept


def budget(
    epoch: int, sizes: Sequence[int], *, start: float, target: float, epochs: int = 100, warmup: int = 0, final: int = 0
) -> int:
    r"""Returns how many entries all layers together keep in an epoch.

    \(V_0\) up to epoch \(t_i\), \(V_T\) after \(E - t_f\), and between them
    \(\lfloor V_T + (V_0 - V_T)(1 - \frac{\tau - t_i}{E - t_f - t_i})^3 \rfloor\).

    Args:
      epoch: \(\tau\), from 0. The clock is that of epochs, not of steps.
      sizes: entries of every layer.
      start: \(s\) at the start.
      target: \(s\) at the end.
      epochs: \(E\), a setting of its own, apart from how many are trained.
      warmup: \(t_i\).
      final: \(t_f\). Where it is 0 the last epoch, \(E - 1\), stays above the target by a share of \(1 / E^3\).

    Raises:
      ValueError: a sparsity is not in [0, 1], or the phases are longer than all epochs.

    Example:
      >>> [budget(epoch, [600, 400], start=0.0, target=0.8, epochs=5) for epoch in range(6)]
      [1000, 609, 372, 251, 206, 200]
    """
    for name, value in (("start", start), ("target", target)):
        check_number(f"snella: {name}", value, least=0.0, most=1.0)
    for name, value, least in (("epoch", epoch, 0), ("epochs", epochs, 1), ("warmup", warmup, 0), ("final", final, 0)):
        check_int(f"snella: {name}", value, least=least)
    length = epochs - final - warmup
    if length <= 0:
        raise ValueError(f"snella: warmup={warmup} and final={final} leave nothing of epochs={epochs}.")
    first, last = (math.floor(sum((1.0 - s) * n for n in sizes) + ROUNDING) for s in (start, target))
    if epoch <= warmup:
        return first
    if epoch > epochs - final:
        return last
    return math.floor(last + (first - last) * (1.0 - (epoch - warmup) / length) ** 3 + ROUNDING)


def share_out(scores: Sequence[float], sizes: Sequence[int], total: int, *, least: int = 0) -> list[int]:
    r"""Returns how many entries every layer keeps: in proportion to its score, and no more than it has.

    What layers cannot take goes to those with room, by score again, at most as often as there are layers. A layer of
    score 0 gets nothing, unless all are 0, which share evenly.

    Args:
      scores: \(R_l \ge 0\); their scale does not matter.
      sizes: \(S_l\).
      total: \(V\).
      least: entries that every layer keeps in any case, as far as it has them; of this library, 0 as published.

    Raises:
      ValueError: `least` entries of every layer are more than `total`.

    Example:
      >>> share_out([3.0, 1.0, 0.0], [10, 100, 100], 60)
      [10, 50, 0]
    """
    weights, room = np.asarray(scores, np.float64), np.asarray(sizes, np.float64)
    weights = weights / weights.max() if weights.max(initial=0.0) > 0 else np.ones_like(weights)
    kept = np.minimum(room, least)
    if kept.sum() > total:
        raise ValueError(f"snella: least={least} entries a layer are more than the budget of {total}.")
    for _ in sizes:
        rest, open_ = total - kept.sum(), (kept < room - ROUNDING) & (weights > 0)
        if rest <= ROUNDING or not open_.any():
            break
        added = rest * np.where(open_, weights, 0.0) / weights[open_].sum()
        kept = np.minimum(room, kept + added)
    return [math.floor(v + ROUNDING) for v in kept]
