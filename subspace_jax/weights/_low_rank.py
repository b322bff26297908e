"""A frozen array plus a product of two small factors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, Scalar, Weight, dense, placed_like, product, register_weight, static
from subspace_jax.linalg import is_narrow, wide_dtype
from subspace_jax.weights._dropout import drop_inputs, step_keys

# Columns of the sum below this share of its parts, in squares: expanded, they would lose more than 6 bits.
CANCELLATION = 1.0 / 64.0


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Weight):
    r"""A frozen array plus a low-rank product of trainable factors: \(W + s\,a\,b\).

    Used as \(x W + (s\,(x a))\,b\); the product \(a b\) is formed only by `materialize`.

    Attributes:
      base: \(W\), of the weight's shape, or a weight that stands for it (a quantized one, say); usually frozen.
      a: `[*stack, in, rank]`, the side of the inputs.
      b: `[*stack, rank, out]`, the side of the outputs.
      scale: \(s\), a scalar.
      rank_stabilized: the scale was made as \(\alpha / \sqrt r\), not as \(\alpha / r\); for files that hold alpha.
      dropout: probability of dropping an input of the factors, where `dropout_key` is set.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      start_a: `a` at the start, kept where `base` is a residual, so that the change from the original array is known.
      start_b: likewise `b`.
      base_squares: squared norms of the columns of `base`, `[*stack, out]`, where something needs those of the sum at
        every step.
    """

    base: jax.Array | Weight
    a: jax.Array
    b: jax.Array
    dropout_key: jax.Array | None = None
    start_a: jax.Array | None = None
    start_b: jax.Array | None = None
    base_squares: jax.Array | None = None
    scale: Scalar = 1.0
    rank_stabilized: bool = static(default=False, remark=True)
    dropout: float = static(default=0.0)

    divisible: ClassVar[tuple[str, ...]] = ("in", "out")
    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "a": "stack in rank",
        "b": "stack rank out",
        "dropout_key": "stack",
        "start_a": "stack in rank",
        "start_b": "stack rank out",
        "base_squares": "stack out",
        "scale": "",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    def original_factors(self) -> tuple[jax.Array, jax.Array]:
        r"""Returns factors of the change from the original array, at the same scale.

        They are \(a\) and \(b\), and of twice the rank where `base` is a residual: \([a\,|\,a_0]\) and \([b; -b_0]\).
        """
        if self.start_a is None or self.start_b is None:
            return self.a, self.b
        return jnp.concatenate([self.a, self.start_a], axis=-1), jnp.concatenate([self.b, -self.start_b], axis=-2)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns \\(W + s\\,a\\,b\\), added in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        delta = dense((one.a.astype(wide) * one.scale.astype(wide), one.b.astype(wide)), one.role, one.shape)
        return (_dense_base(one.base, wide) + delta).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the factors, in the cheap order."""
        addition = operation.product(self.drop(x, operation), (self.a, self.b), self.scale)
        return self.contract_base(x, operation) + addition

    def contract_base(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` alone."""
        return self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)

    def squared_norms(self) -> jax.Array:
        r"""Returns \(\|W + s a b\|^2\) of every output column without forming the sum.

        \(\|w_j\|^2 + 2 s\,(a^T w_j) \cdot b_j + s^2\,b_j^T (a^T a)\,b_j\): the cost of one product with `a`, and
        no intermediate larger than `b`. Where a column of the sum is so much smaller than the two that they cancel,
        below 1 / 64 in squares, the sum is formed for once: at run time, by a conditional, whose test costs one
        comparison a column. Under `jax.vmap` over weights both ways are run. Over a base in bfloat16 or float16 the
        products are of its dtype, with sums in float32 inside, so that the base is converted where it is formed only.
        """
        return _squared_norms(self)

    def with_key(self, key: jax.Array) -> LowRank:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.a.shape[:-2]))

    def drop(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the factors' input with inverted dropout, if this is a training step."""
        return drop_inputs(x, operation, self.dropout_key, self.dropout)


def _dense_base(base: jax.Array | Weight, dtype: Any) -> jax.Array:
    return base.materialize(dtype) if isinstance(base, Weight) else base.astype(dtype)


# Outside of a trace this is one program, inside a part of the one that is traced.
@functools.partial(jax.jit, inline=True)
def _squared_norms(weight: LowRank) -> jax.Array:
    one = weight.with_frozen_stopped()
    wide = wide_dtype(one.dtype)
    base = one.role.matrix(_dense_base(one.base, wide) if isinstance(one.base, Weight) else one.base)
    narrow = is_narrow(base.dtype)
    a, b = one.a.astype(wide), one.b.astype(wide) * one.scale.astype(wide)

    stack = tuple(f"stack{i}" for i in range(a.ndim - 2))

    def times(
        left: jax.Array, axes: str, right: jax.Array, right_axes: str, out_axes: str, narrow: bool = narrow
    ) -> jax.Array:
        # By label, so that a split input axis is summed over under explicit mesh axes as well.
        labels = ((*stack, *names) for names in (axes, right_axes, out_axes))
        left_labels, right_labels, out_labels = labels
        if narrow:
            left, right = left.astype(base.dtype), right.astype(base.dtype)
            return product(left, left_labels, right, right_labels, out_labels).astype(wide)
        return product(left, left_labels, right, right_labels, out_labels, precision=jax.lax.Precision.HIGHEST)

    spread = times(times(a, "ir", a, "iq", "rq"), "rq", b, "qo", "ro")
    cross = 2.0 * times(a, "ir", base, "io", "ro")
    if one.base_squares is None:
        squares = jnp.sum(jnp.square(base.astype(wide)), axis=-2)
    else:
        squares = one.base_squares.astype(wide)
    expanded = squares + jnp.sum((cross + spread) * b, axis=-2)
    # What rounding of the three terms leaves is a share of the largest of them, not of their sum.
    cancels = jnp.any(expanded < CANCELLATION * (squares + jnp.sum(spread * b, axis=-2)))

    def formed() -> jax.Array:
        total = base.astype(wide) + times(a, "ir", b, "ro", "io", narrow=False)
        return placed_like(jnp.sum(total * total, axis=-2), expanded)

    value = jax.lax.stop_gradient(jax.lax.cond(cancels, formed, lambda: expanded))
    # The derivative is that of the expanded form: linear in the sum, it loses its digits only where the sum does,
    # and the backward pass keeps nothing of the weight's size.
    return value + (expanded - jax.lax.stop_gradient(expanded))
