"""How well scores tell anomalies from normal images and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np


def auroc(scores: Any, labels: Any) -> float:
    """Returns the area under the ROC curve: the chance that an anomaly scores above a normal one, ties by half.

    Args:
      scores: any shape, larger is more anomalous.
      labels: the same shape, true for anomalies.

    Raises:
      ValueError: shapes differ, scores are not finite, or one of the two kinds is missing.

    Example:
      >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
      0.75
    """
    flat, positive = _checked("auroc", scores, labels)
    hits, alarms = _curve(flat, positive)
    return float(np.trapezoid(np.r_[0, hits / hits[-1]], np.r_[0, alarms / alarms[-1]]))


def f1_max(scores: Any, labels: Any) -> float:
    """Returns the best F1 score over all thresholds.

    Args:
      scores: any shape, larger is more anomalous.
      labels: the same shape, true for anomalies.

    Raises:
      ValueError: as of `auroc`.

    Example:
      >>> f1_max([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
      0.8
    """
    flat, positive = _checked("f1_max", scores, labels)
    hits, alarms = _curve(flat, positive)
    return float(np.max(2 * hits / (hits + alarms + hits[-1])))


def aupro(maps: Any, masks: Any, limit: float = 0.3) -> float:
    """Returns the normalized area under the per-region overlap, for false-positive rates of pixels up to a limit.

    At each threshold every 8-connected defect counts by the share of it that is found, small ones as much as large
    ones. The curve is taken at all thresholds and cut at the limit by interpolation; a perfect map has 1.

    Args:
      maps: `[images, height, width]`.
      masks: the same shape, true on defects.
      limit: largest false-positive rate, in (0, 1].

    Raises:
      ValueError: as of `auroc`; the arrays are no maps; the limit is out of range.

    Example:
      >>> import numpy as np
      >>> mask = np.zeros((1, 4, 4), bool)
      >>> mask[0, 1:3, 1:3] = True
      >>> aupro(mask.astype(float), mask)
      1.0
    """
    from scipy import ndimage

    flat, positive = _checked("aupro", maps, masks)
    if np.ndim(maps) != 3:
        raise ValueError(f"aupro: maps {np.shape(maps)}; expected [images, height, width].")
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"aupro: limit={limit!r}; expected a rate above 0 and at most 1.")
    weights, regions = np.zeros(np.shape(masks)), 0
    for weight, mask in zip(weights, np.asarray(masks, bool), strict=True):
        labeled: Any = ndimage.label(mask, np.ones((3, 3)))
        found, count = labeled
        sizes = np.bincount(found.ravel(), minlength=count + 1)
        weight[mask] = 1.0 / sizes[found[mask]]
        regions += count
    overlap, alarms = _curve(flat, positive, weights.ravel())
    overlap, rate = np.r_[0, overlap / regions], np.r_[0, alarms / alarms[-1]]
    end = np.searchsorted(rate, limit, side="right")
    rate_cut, overlap_cut = np.r_[rate[:end], limit], np.r_[overlap[:end], np.interp(limit, rate, overlap)]
    return float(np.trapezoid(overlap_cut, rate_cut) / limit)


def _checked(what: str, scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    flat, positive = np.asarray(scores, np.float64).ravel(), np.asarray(labels, bool).ravel()
    if np.shape(scores) != np.shape(labels):
        raise ValueError(f"{what}: scores {np.shape(scores)} and labels {np.shape(labels)}; expected one shape.")
    if not np.isfinite(flat).all():
        raise ValueError(f"{what}: scores hold NaN or infinity; they have no order.")
    if positive.all() or not positive.any():
        kind = "normal" if positive.all() else "anomalous"
        raise ValueError(f"{what}: all {positive.size} labels are the same; expected {kind} ones as well.")
    return flat, positive


def _curve(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Returns what is found and how many false alarms there are at every distinct threshold, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(scores[order])), scores.size - 1]
    found = np.cumsum((positive if weights is None else weights)[order], dtype=np.float64)
    return found[last], np.cumsum(~positive[order], dtype=np.float64)[last]
