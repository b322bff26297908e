"""Weights that are a low-rank addition once their parts are put together."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import Operation, Scalar, Weight, register_weight, static
from subspace_jax.weights._dropout import step_keys
from subspace_jax.weights._low_rank import LowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class AsLowRank(Weight):
    r"""A frozen array plus a low-rank product whose factors follow from what is stored: \(W + s\,a\,b\).

    A concrete class adds its parts and `factors`, which are small beside the weight and made anew at each step; all
    else is that of `LowRank`. Banks, mergers and PEFT's files take what `plain` gives.

    Attributes:
      base: \(W\), of the weight's shape, or a weight that stands for it.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      base_squares: squared norms of the columns of `base`, `[*stack, out]`, where something needs those of the sum at
        every step.
      scale: \(s\), a scalar.
      rank_stabilized: the scale was made as \(\alpha / \sqrt r\), not as \(\alpha / r\).
      dropout: probability of dropping an input of the factors, where `dropout_key` is set.
    """

    base: jax.Array | Weight
    dropout_key: jax.Array | None = None
    base_squares: jax.Array | None = None
    scale: Scalar = 1.0
    rank_stabilized: bool = static(default=False, remark=True)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "dropout_key": "stack",
        "base_squares": "stack out",
        "scale": "",
    }

    @abc.abstractmethod
    def factors(self) -> tuple[jax.Array, jax.Array]:
        r"""Returns \(a\), `[*stack, in, rank]`, and \(b\), `[*stack, rank, out]`, in at least float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    def plain(self) -> LowRank:
        """Returns the same function as an ordinary `LowRank`."""
        a, b = self.with_frozen_stopped().factors()
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(AsLowRank)}
        return LowRank(**{**shared, "a": a, "b": b, "trainable": ("a", "b")})

    def materialize(self, dtype: Any = None) -> jax.Array:
        r"""Returns \(W + s\,a\,b\), added in float32."""
        return self.plain().materialize(dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the factors."""
        return self.plain().contract(x, operation)

    def squared_norms(self) -> jax.Array:
        """Returns the squared norm of every output column without forming the sum."""
        return self.plain().squared_norms()

    def with_key(self, key: jax.Array) -> AsLowRank:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.drops:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.role.stack_shape(self.shape)))

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return bool(self.dropout)
