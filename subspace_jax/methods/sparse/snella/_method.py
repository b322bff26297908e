"""`snella`: the mixed kernel of two factors, whose sparsity is given out anew during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Method,
    RankError,
    Role,
    check_choice,
    check_dtype,
    check_number,
    check_probability,
    check_rank,
    register_weight,
    require_matrix,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.snell import KernelSparse, Rule, pieces_sum, start_factors
from subspace_jax.methods.sparse.snella._budget import kept_entries, order_of


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedKernelSparse(KernelSparse):
    r"""`KernelSparse` with the mixed kernel \(D_0 + a\,\mathrm{softmax}_j(D_0 / g) + e\).

    \(D_0\) is the piecewise distance kernel; the softmax of each input runs over the outputs.

    Attributes:
      alpha: \(a\), `[*stack]`, 1 at the start.
      gamma: \(g\), `[*stack]`, 1 at the start; not bounded, so watch it.
      shift: \(e\), `[*stack]`, 0 at the start.
    """

    shift: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {**KernelSparse.axes, "shift": "stack"}

    def parts(self) -> dict[str, Any]:
        """Returns the fields that the addition is made of."""
        return {**super().parts(), "shift": self.shift}

    def matrix(self, parts: Mapping[str, Any]) -> jax.Array:
        r"""Returns the mixed kernel matrix before the competition, `[*stack, in, out]`, in float32 or wider."""
        wide = {n: v.astype(wide_dtype(v.dtype)) for n, v in parts.items() if n != "order"}
        distances = pieces_sum(wide["a"], wide["b"])
        scale, temperature, shift = (wide[n][..., None, None] for n in ("alpha", "gamma", "shift"))
        return distances + scale * jax.nn.softmax(distances / temperature, axis=-1) + shift


def snella(
    rank: int,
    *,
    sparsity: float = 0.0,
    rule: Rule = "hard",
    dropout: float = 0.1,
    drop_path: float = 0.1,
    competes: bool = True,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains two factors of a mixed kernel; entries compete inside a layer, and layers for the budget of entries.

    \(\Delta W = D\,|D|\) where \(|D|\) is above its \(s_l\)-quantile, else 0, with the magnitude held fixed in
    differentiation. Every layer starts at the same \(s\); train with `with_importance`, and after every epoch let
    `reallocate` give the budget to the layers whose factors matter most. Contents change, shapes do not: one program
    serves the whole run.

    Published: all linear layers, AdamW at 1e-3 without decay of the scalars, and an exponential average of weights
    (decay 0.9999) that is evaluated too: evaluate it with the current budgets, not with the first.

    Args:
      rank: \(r\), even; 32.
      sparsity: \(s\) at the start: 0 for fine-grained sets, 0.01 for VTAB. The target belongs to `reallocate`.
      rule: "hard", as released; "soft" as in `sj.methods.snell`.
      dropout: of the addition's inputs, where `with_dropout` gives keys.
      drop_path: of the addition, for whole examples, likewise.
      competes: False adds \(D\) itself, what the released scripts do for a target of 0. It is no limit of small \(s\):
        at \(s = 0\) the competition still gives \(D\,|D|\), without its smallest entry.
      dtype: of what learns.

    Returns:
      A method whose weights are `MixedKernelSparse`, with \(r (d_{in} + d_{out}) + 3\) values a layer.
      `sj.methods.snell.to_entries` writes them as single entries.

    Raises:
      RankError: the rank is odd.
      ValueError: an option is out of range.

    Note:
      At the start the softmax adds nearly the same to every entry, about \(1 / d_{out}\), which is more than \(D_0\)
      there: what survives are the largest \(D_0\), with their sign.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.snella.snella(4, sparsity=0.9)
      >>> adapted = sj.adapt({"w": jnp.zeros((10, 5))}, {"w": method}, key=jax.random.key(0))
      >>> int(jnp.sum(sj.merge(adapted)["w"] != 0)), sj.summary(adapted).trainable
      (5, 63)
    """
    rank = check_rank(rank, what="snella: rank")
    if rank % 2:
        raise RankError(f"snella: rank={rank}: expected an even number, one half for each piece of the kernel.")
    check_number("snella: sparsity", sparsity, least=0.0, most=1.0)
    check_choice("snella: rule", rule, ("soft", "hard"))
    check_probability("snella: dropout", dropout)
    check_probability("snella: drop_path", drop_path)
    dtype = check_dtype("snella: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> MixedKernelSparse:
        del stats
        require_matrix(array, role)
        sizes, stack = role.sizes(array.shape), role.stack_shape(array.shape)
        a, b = start_factors(key, stack, sizes, rank, 2, dtype)
        entries = sizes[0] * sizes[1]
        order = order_of(kept_entries(sparsity, entries), entries, rule)
        scalars: dict[str, Any] = {
            name: jnp.full(stack, value, dtype) for name, value in (("alpha", 1.0), ("gamma", 1.0), ("shift", 0.0))
        }
        return MixedKernelSparse(
            base=array,
            a=a,
            b=b,
            order=jnp.full(stack, order, jnp.int32),
            **scalars,
            rule=rule,
            competes=competes,
            dropout=dropout,
            drop_path=drop_path,
            role=role,
            dtype=array.dtype,
            trainable=("a", "b", *scalars),
        )

    return Method("snella", make)
