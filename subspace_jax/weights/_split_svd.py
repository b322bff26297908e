"""An array split by its singular values: the large part is frozen, the factors of the small part learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import Dot, Use, Weight
from subspace_jax.weights._low_rank_core import LowRankCore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSVD(LowRankCore):
    r"""\(K_h + L\,\mathrm{diag}(s)\,R\) with a frozen part \(K_h\) of large singular values and trainable factors.

    The singular vectors of the frozen part are kept beside it, for those who keep the factors at right angles to them.
    Columns of zeros fill up where there are fewer triples than columns: of stacked layers with unequal ranks, or where
    room is left for other ranks.

    Attributes:
      base: \(K_h = L_h\,\mathrm{diag}(s_h)\,R_h\), of the weight's shape: formed once, so that no step multiplies
        frozen factors.
      high_left: \(L_h\), `[*stack, in, high]`, orthonormal columns.
      high_right: \(R_h\), `[*stack, high, out]`, orthonormal rows.
      left: \(L\), `[*stack, in, low]`, trainable.
      core: \(s\), `[*stack, low]`, trainable.
      right: \(R\), `[*stack, low, out]`, trainable.
      live: 1 where a triple of the factors is one, 0 where it only fills up, `[*stack, low]`; None where all are.
      route: as for `LowRankCore`.
    """

    high_left: jax.Array
    high_right: jax.Array
    live: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {
        **LowRankCore.axes,
        "high_left": "stack in rank",
        "high_right": "stack rank out",
        "live": "stack rank",
    }

    def materialize(self, dtype: Any = None) -> jax.Array:
        r"""Returns \(K_h + L\,\mathrm{diag}(s)\,R\), added in float32."""
        return LowRankCore.materialize(self.masked(), dtype)

    def contract(self, x: jax.Array, use: Use) -> jax.Array:
        """Returns the operation on the sum, or on its parts where that costs less."""
        if not self.rank and not isinstance(self.base, Weight):
            return use.apply(x, jax.lax.stop_gradient(self.base))
        return LowRankCore.contract(self.masked(), x, use)

    def masked(self) -> SplitSVD:
        """Returns the weight with zeros for the values that only fill up: then nothing of them learns."""
        if self.live is None:
            return self
        return dataclasses.replace(self, core=self.core * jax.lax.stop_gradient(self.live), live=None)

    def _forming_is_cheaper(self, x: jax.Array, use: Use) -> bool:
        """As for `LowRankCore`, but the factors learn too, so that both routes pay for their gradients."""
        inputs, outputs = self.role.sizes(self.shape)
        if not isinstance(use, Dot) or not use.contracts_inputs:
            return False
        rows = x.size // inputs
        factored = 6 * rows * self.rank * (inputs + outputs)
        formed = 2 * inputs * outputs * (3 * self.rank + rows)
        return formed < factored
