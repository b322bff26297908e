"""A low-rank addition whose input side is frozen, and which knows the columns that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import register_weight, static
from subspace_jax.merging import Factored, Form, read_change, register_form
from subspace_jax.methods.low_rank.orthogonal_adaptation._basis import Basis, Mode
from subspace_jax.weights import LowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConceptLowRank(LowRank):
    r"""A low-rank addition of one concept: \(W + s\,Q\,b\), with frozen columns \(Q\) of a basis that concepts share.

    In use it is a `LowRank`, with \(Q\) as `a`. What it knows of its columns are arrays, so that the concepts of one
    model run in one program.

    Attributes:
      columns: which columns of the basis \(Q\) are, int32 `[rank]`, the same in all layers of a stack.
      seed: of the basis, uint32 `[2]`: the master seed, and a hash of the kernel's path where it has a basis of its
        own.
      mode: how the columns were chosen.
      basis: how the basis is made.
    """

    columns: jax.Array
    seed: jax.Array
    mode: Mode = static(default="slot")
    basis: Basis = static(default="qr")

    axes: ClassVar[Mapping[str, str]] = {**LowRank.axes, "columns": "rank", "seed": ""}

    def plain(self) -> LowRank:
        """Returns the same function as an ordinary `LowRank` that trains `b` alone."""
        return LowRank(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LowRank)})


def _read(path: str, weight: ConceptLowRank, base: Any) -> Factored | None:
    change = read_change(path, weight.plain(), base)
    return change if isinstance(change, Factored) else None


register_form(ConceptLowRank, Form(_read))
