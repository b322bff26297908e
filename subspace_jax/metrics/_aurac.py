"""AURAC: the area under the curve of accuracy over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def aurac(ranks: Sequence[int], accuracies: Sequence[float], *, log: bool = True) -> float:
    r"""Returns the mean height of the rank-accuracy curve, by trapezoids.

    Args:
      ranks: positive, ascending, no rank twice.
      accuracies: one per rank, all in percent or all as shares.
      log: measure along \(\log_2 r\), so that every doubling counts the same (the second version of the publication);
        False measures along \(r\) (the first).

    Raises:
      ValueError: the lengths differ, or the ranks are not positive and ascending.

    Example:
      >>> aurac((1, 2, 4, 8, 16), (10.0, 20.0, 40.0, 50.0, 55.0))
      35.625

    References:
      Modoranu, Safaryan, Alistarh, MatryoshkaLoRA: Learning Accurate Hierarchical Low-Rank Representations for LLM
      Fine-Tuning, 2026.
    """
    x, y = np.asarray(ranks, np.float64), np.asarray(accuracies, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"aurac: {x.size} ranks and {y.size} accuracies; expected one accuracy for each rank.")
    if x[0] < 1 or (np.diff(x) <= 0).any():
        raise ValueError(f"aurac: ranks={tuple(ranks)}; expected positive ranks in ascending order, none twice.")
    if len(x) == 1:
        return float(y[0])
    x = np.log2(x) if log else x
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (x[-1] - x[0]))
