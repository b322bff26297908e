"""A frozen array plus a product of two small factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Lookup, Use, Weight, dense, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Weight):
    r"""\(W + s\,a\,b\) with a frozen \(W\) and small trainable factors.

    Used as \(x W + (s\,(x a))\,b\); the product \(a b\) is formed only by `materialize`.

    Attributes:
      base: \(W\), of the weight's shape; usually frozen.
      a: `[*stack, in, rank]`, the side of the inputs.
      b: `[*stack, rank, out]`, the side of the outputs.
      scale: \(s\).
      dropout: probability of dropping an input of the factors, where `dropout_key` is set.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    dropout_key: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "a": "stack in rank",
        "b": "stack rank out",
        "dropout_key": "stack",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns \\(W + s\\,a\\,b\\), added in float32."""
        one = self.with_frozen_stopped()
        wide = jnp.promote_types(jnp.float32, one.base.dtype)
        delta = dense((one.a.astype(wide) * one.scale, one.b.astype(wide)), one.role, one.shape)
        return (one.base.astype(wide) + delta).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, use: Use) -> jax.Array:
        """Returns the operation on `base` plus that on the factors, in the cheap order."""
        return use.apply(x, self.base) + use.product(self.drop(x, use), (self.a, self.b), self.scale)

    def with_key(self, key: jax.Array) -> LowRank:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        stack = self.a.shape[:-2]
        return dataclasses.replace(self, dropout_key=jax.random.split(key, stack) if stack else key)

    def drop(self, x: jax.Array, use: Use) -> jax.Array:
        """Returns the factors' input with inverted dropout, if this is a training step."""
        if self.dropout_key is None or not self.dropout or isinstance(use, Lookup):
            return x
        key = self.dropout_key
        if key.ndim:  # experts contracted together: their inputs are one array, with one mask
            key = key.ravel()[0]
        for index in use.path:
            key = jax.random.fold_in(key, index)
        keep = 1.0 - self.dropout
        mask = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))
