"""How well clusters agree with classes, whatever the clusters are called."""

from __future__ import annotations

from typing import Any

import numpy as np


def clustering_accuracy(classes: Any, clusters: Any) -> float:
    """Returns the share of samples that are right under the best one-to-one naming of clusters by classes.

    Args:
      classes: `[samples]` integers, not negative.
      clusters: `[samples]` integers, not negative; there may be more or fewer of them than classes.

    Raises:
      ValueError: the two differ in length, or are empty.

    Example:
      >>> clustering_accuracy([0, 0, 1, 1], [1, 1, 0, 1])
      0.75
    """
    from scipy.optimize import linear_sum_assignment

    truth, found = np.asarray(classes).ravel(), np.asarray(clusters).ravel()
    if truth.shape != found.shape or not truth.size:
        raise ValueError(
            f"clustering_accuracy: {truth.size} classes and {found.size} clusters; expected as many, not 0."
        )
    counts = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(counts, (truth, found), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / truth.size)
