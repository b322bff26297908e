"""A frozen array plus a small core between two frozen factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Dot, Operation, Scalar, Weight, dense, register_weight, static
from subspace_jax.linalg import is_narrow, wide_dtype

Route = Literal["factored", "materialized", "auto"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankCore(Weight):
    r"""A frozen array plus a trainable core, full or diagonal, between frozen factors: \(W + s\,P\,R\,Q\).

    Used as \(x W + ((s\,(x P))\,R)\,Q\), or, where the rank is so large that this costs more, by forming the sum.

    Attributes:
      base: \(W\), of the weight's shape, or a weight that stands for it; None for zero, where the factors hold all.
      left: \(P\), `[*stack, in, rank]`.
      core: \(R\), `[*stack, rank, rank]`, or the diagonal of one, `[*stack, rank]`.
      right: \(Q\), `[*stack, rank, out]`.
      scale: \(s\), a scalar.
      route: "factored" multiplies with the factors one after the other, "materialized" forms the sum first, "auto"
        takes what costs fewer operations for the input at hand, backward pass included.
      wide_only: the product cancels between the factors, so in bfloat16 and float16 the sum is always formed, in
        float32, in place of multiplying with them; as for the triangles of an LU factorization.
      in_sizes: sizes of the role's input axes, for a weight without `base`.
      out_sizes: sizes of the role's output axes, likewise.
    """

    base: jax.Array | Weight | None
    left: jax.Array
    core: jax.Array
    right: jax.Array
    scale: Scalar = 1.0
    route: Route = static(default="factored")
    wide_only: bool = static(default=False)
    in_sizes: tuple[int, ...] = static(default=())
    out_sizes: tuple[int, ...] = static(default=())

    divisible: ClassVar[tuple[str, ...]] = ("in", "out")
    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "left": "stack in rank",
        "core": "stack rank",
        "right": "stack rank out",
        "scale": "",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`, or what the factors stand for without one."""
        if self.base is not None:
            return self.base.shape
        return self.role.joined_shape(self.left.shape[:-2], self.in_sizes, self.out_sizes)

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return self.left.shape[-1]

    def materialize(self, dtype: Any = None) -> jax.Array:
        r"""Returns \(W + s\,P\,R\,Q\), added in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        left, core, right = (v.astype(wide) for v in (one.left, one.core, one.right))
        core = core * one.scale.astype(wide)
        total = dense((left, core, right), one.role, one.shape)
        if one.base is not None:
            base = one.base.materialize(wide) if isinstance(one.base, Weight) else one.base.astype(wide)
            total = base + total
        return total.astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the three factors, in the cheap order."""
        if self._is_formed(x, operation):
            return operation.apply(x, self._formed(operation.dtype))
        product = operation.product(x, (self.left, self.core, self.right), self.scale)
        if self.base is None:
            return product
        base = self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)
        return base + product

    def _formed(self, dtype: Any) -> jax.Array:
        """The sum for one step: in a narrow dtype from products of it, so that nothing large is converted."""
        one = self.with_frozen_stopped()
        base = one.base
        if not is_narrow(dtype) or self.wide_only or isinstance(base, Weight):
            return self.materialize(dtype)
        left, core, right = (
            v.astype(dtype) for v in (one.left, one.core * one.scale.astype(one.core.dtype), one.right)
        )
        total = dense((left, core, right), one.role, one.shape)
        return total if base is None else base.astype(dtype) + total

    def reshape(self, shape: tuple[int, ...]) -> LowRankCore | None:
        """Returns the weight of the reshaped array, as every weight does; see `Weight.reshape`."""
        found = super().reshape(shape)
        if found is None or self.base is not None:
            return found
        return dataclasses.replace(found, in_sizes=found.role.in_shape(shape), out_sizes=found.role.out_shape(shape))

    def map_axis(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> LowRankCore | None:
        """Returns the weight of a part of the array, as every weight does; see `Weight.map_axis`."""
        found = super().map_axis(axis, function)
        if found is None or self.base is not None:
            return found
        whole = jax.ShapeDtypeStruct(self.shape, self.dtype)
        shape = jax.eval_shape(lambda array: function(array, axis), whole).shape
        return dataclasses.replace(found, in_sizes=found.role.in_shape(shape), out_sizes=found.role.out_shape(shape))

    def learning_size(self, name: str) -> int | None:
        """Returns how many values of a diagonal core belong to factors that are not padding."""
        halves = (self.left, self.right)
        if name != "core" or any(half is None for half in halves) or self.core.ndim != self.left.ndim - 1:
            return None
        return int(jnp.sum(jnp.any(self.left != 0, axis=-2) & jnp.any(self.right != 0, axis=-1)))

    def _is_formed(self, x: jax.Array, operation: Operation) -> bool:
        if self.wide_only and is_narrow(operation.dtype):
            return True
        return self.route == "materialized" or (self.route == "auto" and self._forming_is_cheaper(x, operation))

    def _forming_is_cheaper(self, x: jax.Array, operation: Operation) -> bool:
        """Compares multiplications of both routes, forward and backward, for `x` of this size.

        Factored: the rows meet both factors, forward and backward. Formed: the product of the factors and its
        gradient, and the gradient of the whole weight, which the factored route never needs. Two products with
        `base` are part of both; without one they are only part of the formed route.
        """
        inputs, outputs = self.role.sizes(self.shape)
        if not isinstance(operation, Dot) or not operation.contracts_inputs:
            return False
        rows = x.size // inputs
        factored = 4 * rows * self.rank * (inputs + outputs)
        formed = 2 * inputs * outputs * (2 * self.rank + rows * (1 if self.base is not None else 3))
        return formed < factored
