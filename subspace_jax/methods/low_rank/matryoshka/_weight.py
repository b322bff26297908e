"""A low-rank addition whose leading columns and rows are usable alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, register_weight, static
from subspace_jax.weights import LowRank

RankScale = Literal["none", "rank", "sqrt"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedLowRank(LowRank):
    r"""A low-rank addition usable at several ranks: \(W + s\,a\,\mathrm{diag}(p)\,b\), with fixed falling gains \(p\).

    Attributes:
      gains: \(p\), `[rank]`, frozen. All layers have one; `at_rank` and `sample_rank` replace it.
      ranks: the ranks that are to be usable, ascending.
      rank_scale: \(s(r)\) of a rank used alone: "none" is 1, "rank" \(1/r\), "sqrt" \(1/\sqrt{r}\).
      normalize: \(p\) is divided by the number of ranks in training.
    """

    gains: jax.Array
    ranks: tuple[int, ...] = static()
    rank_scale: RankScale = static(default="none")
    normalize: bool = static(default=False)

    axes: ClassVar[Mapping[str, str]] = {**LowRank.axes, "gains": "rank"}

    def materialize(self, dtype: Any = None) -> jax.Array:
        r"""Returns \(W + s\,a\,\mathrm{diag}(p)\,b\), added in float32."""
        return self.plain().materialize(dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the factors; the gains scale the rank-sized intermediate."""
        # One array for all layers, but a stacked chain has a diagonal per layer.
        gains = jnp.broadcast_to(jax.lax.stop_gradient(self.gains), (*self.a.shape[:-2], self.rank))
        return self.contract_base(x, operation) + operation.product(
            self.drop(x, operation), (self.a, gains, self.b), self.scale
        )

    def squared_norms(self) -> jax.Array:
        """Returns the squared norm of every output column without forming the sum."""
        return self.plain().squared_norms()

    def plain(self) -> LowRank:
        """Returns the same function as an ordinary `LowRank`, the gains multiplied into `b`."""
        gains = jax.lax.stop_gradient(self.gains).astype(self.b.dtype)
        return self.as_low_rank(self.a, self.b * gains[:, None])

    def as_low_rank(self, a: jax.Array, b: jax.Array) -> LowRank:
        """Returns an ordinary `LowRank` with other factors and everything else as it is here."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(LowRank)}
        return LowRank(**{**fields, "a": a, "b": b})
