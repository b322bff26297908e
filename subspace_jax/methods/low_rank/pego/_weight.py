"""Several low-rank additions in one pair of factors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import register_weight, static
from subspace_jax.merging import Factored, Form, read_change, register_form
from subspace_jax.weights import LowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLowRank(LowRank):
    r"""A frozen array and a group of low-rank additions: \(W + \sum_i A_i B_i\).

    The factors stand side by side, \(a = [A_1 | \dots | A_N]\) and \(b = [B_1; \dots; B_N]\), so that the group is
    used, merged and served as one `LowRank`.

    Attributes:
      modules: \(N\), the number of additions.
    """

    modules: int = static(default=1)

    def groups(self) -> tuple[jax.Array, jax.Array]:
        r"""Returns \(A_i\), `[*stack, N, in, rank / N]`, and \(B_i\), `[*stack, N, rank / N, out]`."""
        *stack, inputs, rank = self.a.shape
        size = rank // self.modules
        a = jnp.moveaxis(self.a.reshape(*stack, inputs, self.modules, size), -2, -3)
        return a, self.b.reshape(*stack, self.modules, size, self.b.shape[-1])

    def plain(self) -> LowRank:
        """Returns the same function as an ordinary `LowRank`."""
        return LowRank(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LowRank)})


def _read(path: str, weight: GroupLowRank, base: Any) -> Factored | None:
    change = read_change(path, weight.plain(), base)
    return change if isinstance(change, Factored) else None


register_form(GroupLowRank, Form(_read))
