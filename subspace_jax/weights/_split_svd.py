"""An array as its singular triples, of which the large ones are frozen and the small ones learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import Lookup, Use, Weight, dense, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights._low_rank_core import Route


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSVD(Weight):
    r"""\(L_h\,\mathrm{diag}(s_h)\,R_h + L\,\mathrm{diag}(s)\,R\) with a frozen first and a trainable second term.

    Columns of zeros fill up where the terms have fewer triples than columns: of stacked layers with unequal ranks, or
    where room is left for other ranks.

    Attributes:
      high_left: \(L_h\), `[*stack, in, high]`, orthonormal columns.
      high_values: \(s_h\), `[*stack, high]`.
      high_right: \(R_h\), `[*stack, high, out]`, orthonormal rows.
      left: \(L\), `[*stack, in, low]`.
      values: \(s\), `[*stack, low]`.
      right: \(R\), `[*stack, low, out]`.
      live: 1 where a triple of the second term is one, 0 where it only fills up, `[*stack, low]`; None where all are.
      route: "factored" multiplies with the factors one after the other, "materialized" forms the sum first, "auto"
        takes what costs fewer operations for the input at hand, backward pass included.
    """

    high_left: jax.Array
    high_values: jax.Array
    high_right: jax.Array
    left: jax.Array
    values: jax.Array
    right: jax.Array
    live: jax.Array | None = None
    route: Route = static(default="auto")
    # The array itself is not kept, so its shape has to be.
    full_shape: tuple[int, ...] = static()

    axes: ClassVar[Mapping[str, str]] = {
        "high_left": "stack in rank",
        "high_values": "stack rank",
        "high_right": "stack rank out",
        "left": "stack in rank",
        "values": "stack rank",
        "right": "stack rank out",
        "live": "stack rank",
    }
