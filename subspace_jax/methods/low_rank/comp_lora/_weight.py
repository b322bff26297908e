"""A low-rank addition that cannot reach given directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import Operation, register_weight
from subspace_jax.linalg import project
from subspace_jax.merging import Factored, Form, read_change, register_form
from subspace_jax.weights import LowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ComplementLowRank(LowRank):
    r"""A frozen array and a low-rank addition in a complement: \(W + s\,(I - U U^T)\,a\,b\,(I - V V^T)\).

    The factors are projected wherever they are used, so that no optimizer, decay or rounding of theirs leads out;
    what is stored as `a` and `b` may lie anywhere.

    Attributes:
      protected_in: \(U\), `[*stack, in, p]`, orthonormal columns, or zero ones where a layer has fewer; None for none.
      protected_out: \(V\), `[*stack, out, p]`, likewise.
    """

    protected_in: jax.Array | None = None
    protected_out: jax.Array | None = None

    # A part of the array has other sums over the directions, so it is formed.
    divisible: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[Mapping[str, str]] = {
        **LowRank.axes,
        "protected_in": "stack in protected",
        "protected_out": "stack out protected",
    }

    def original_factors(self) -> tuple[jax.Array, jax.Array]:
        r"""Returns \((I - U U^T)\,a\) and \(b\,(I - V V^T)\), in at least float32."""
        a, b = self.a, self.b
        if self.protected_in is not None:
            a = project(a, self.protected_in, mode="remove", side="in")
        if self.protected_out is not None:
            b = project(b, self.protected_out, mode="remove", side="out")
        return a, b

    def plain(self) -> LowRank:
        """Returns the same function as an ordinary `LowRank`."""
        one = self.with_frozen_stopped()
        a, b = one.original_factors()
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(LowRank)}
        return LowRank(**{**fields, "a": a, "b": b})

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the sum, added in float32."""
        return self.plain().materialize(dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the projected factors."""
        return self.plain().contract(x, operation)

    def squared_norms(self) -> jax.Array:
        """Returns the squared norm of every output column without forming the sum."""
        return self.plain().squared_norms()


def _read(path: str, weight: ComplementLowRank, base: Any) -> Factored | None:
    change = read_change(path, weight.plain(), base)
    return change if isinstance(change, Factored) else None


register_form(ComplementLowRank, Form(_read))
