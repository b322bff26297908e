"""Frozen arrays whose output features are scaled, and vectors that are scaled and shifted with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, Weight, register_weight, static
from subspace_jax.linalg import wide_dtype


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Weight):
    r"""A frozen kernel, or the scale of a norm, times a factor for every output feature: \(W\,\mathrm{diag}(g)\).

    Attributes:
      base: \(W\), of the weight's shape.
      scale: \(g\), `[*stack, out]`.
      offset: what the model adds to the array before it multiplies by it, 1 for norms of the form \(1 + W\). The array
        stood for is \((W + c)\,\mathrm{diag}(g) - c\) then.
    """

    base: jax.Array
    scale: jax.Array
    offset: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {"base": "array", "scale": "stack out"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def formed(self) -> bool:
        """Whether it is a vector, which has output axes only."""
        return not self.role.in_axes

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the scaled array, computed in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        inputs, outputs = one.role.sizes(one.shape)
        rows = jnp.transpose(one.base, one.role.order)
        rows = rows.reshape(*one.role.stack_shape(one.shape), inputs, outputs).astype(wide)
        scaled = rows * one.scale[..., None, :]
        if one.offset:
            # c g - c as one product: exactly zero where the scale is 1.
            scaled = scaled + one.offset * (one.scale[..., None, :] - 1.0)
        return one.role.unmatrix(scaled, one.shape).astype(dtype or self.dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` with its outputs scaled."""
        return operation.scale_outputs(x, self.scale, lambda x: operation.apply(x, self.base))


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledShifted(Scaled):
    r"""A kernel without a bias whose output features are scaled and shifted: \(x \mapsto g\,(x W) + t\).

    No array stands for it, as a kernel cannot add; folding makes a bias of `shift`.

    Attributes:
      shift: \(t\), `[*stack, out]`.
    """

    shift: jax.Array

    axes: ClassVar[Mapping[str, str]] = {**Scaled.axes, "shift": "stack out"}
    mergeable: ClassVar[bool] = False

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the scaled operation plus the shift."""
        return operation.add_outputs(super().contract(x, operation), self.shift)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedBias(Weight):
    r"""A frozen bias that follows the scale of its layer's kernel, and is shifted: \(g\,b + t\).

    Attributes:
      base: \(b\), of the weight's shape.
      shift: \(t\), `[*stack, out]`.
      scale: \(g\), `[*stack, out]`; stored in the sibling and linked.
    """

    base: jax.Array
    shift: jax.Array
    scale: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {"base": "array", "shift": "stack out", "scale": "stack out"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def formed(self) -> bool:
        """True: a vector costs nothing to form."""
        return True

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the scaled and shifted bias, computed in float32."""
        one = self.with_frozen_stopped()
        bias = jnp.transpose(one.base, one.role.order).reshape(one.shift.shape).astype(wide_dtype(one.dtype))
        scaled = bias if one.scale is None else bias * one.scale
        return one.role.unmatrix(scaled + one.shift, one.shape).astype(dtype or self.dtype)
