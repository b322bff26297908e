"""The bound of the generalization gap that the number of trained values gives."""

from __future__ import annotations

import math
from collections.abc import Iterable

from subspace_jax.core import check_int, check_rank


def generalization_ratio(sizes: Iterable[tuple[int, int]], rank: int, blocks: int) -> float:
    r"""Returns the bound of Block-LoRA's generalization gap, relative to LoRA's of the same nominal rank.

    For values of \(q\) bits, a loss that is sub-Gaussian with \(\sigma\), and \(N\) samples, the gap is at most
    \(\sqrt{2 q \sigma^2 \ln 2 / N}\) times the root of the number of trained values. All but that number cancels:
    \(\sqrt{\sum (r d_{out} + r d_{in} / n)}\) to \(\sqrt{r \sum (d_{in} + d_{out})}\). A bound, and no more.

    Args:
      sizes: inputs and outputs of every adapted weight.
      rank: \(r\), the nominal rank.
      blocks: \(n\).

    Raises:
      RankError: `rank` or `blocks` is not a positive integer.

    Example:
      >>> round(generalization_ratio([(768, 768)], 2, 2) ** 2, 3)
      0.75
    """
    rank, blocks = (
        check_rank(rank, what="generalization_ratio: rank"),
        check_int("generalization_ratio: blocks", blocks),
    )
    pairs = list(sizes)
    ours = sum(rank * outputs + rank * inputs / blocks for inputs, outputs in pairs)
    return math.sqrt(ours / (rank * sum(inputs + outputs for inputs, outputs in pairs)))
