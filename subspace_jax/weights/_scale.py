"""The factor of a low-rank product."""

from __future__ import annotations

import math

from subspace_jax.core import check_number


def lora_scale(rank: int, alpha: float | None, rank_stabilized: bool = False, *, what: str = "alpha") -> float:
    r"""Returns the factor of a low-rank product: \(\alpha / r\), or \(\alpha / \sqrt r\) if rank-stabilized.

    Args:
      rank: \(r\).
      alpha: \(\alpha\), above zero; `rank` if None.
      rank_stabilized: divide by the root of the rank.
      what: owner and name of alpha, for the error.

    Raises:
      ValueError: alpha is not a positive number.

    Example:
      >>> lora_scale(4, 8.0), lora_scale(4, 8.0, rank_stabilized=True)
      (2.0, 4.0)
    """
    alpha = rank if alpha is None else alpha
    check_number(what, alpha, above=0.0)
    return float(alpha / (math.sqrt(rank) if rank_stabilized else rank))
