"""A frozen array plus a small core tensor that a factor expands along every axis."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Convolution, Operation, RoleError, Scalar, Weight, register_weight, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import drop_inputs, step_keys

IN_FACTORS = ("in_0", "in_1", "in_2", "in_3")


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tucker(Weight):
    r"""A frozen array plus a core with one factor for every axis: \(W + s\,G \times_1 U_1 \cdots \times_N U_N\).

    A product is used as \(x W + s\,((x U_{in})\,G)\,U_{out}^T\). A convolution adds a product over its input features,
    a convolution with the small kernel, and a product over its output features.

    Attributes:
      base: \(W\), of the weight's shape.
      core: \(G\), `[*stack, r_1, .., r_out]`.
      in_0: the factor of the role's first input axis, `[*stack, size, r_1]`; of all of them together where `core` has
        two axes; None for a vector.
      in_1: of the second input axis of a convolution.
      in_2: of the third.
      in_3: of the fourth.
      out: the factor of the output axes together, `[*stack, r_out, out]`.
      scale: \(s\).
      dropout: probability of dropping an input of the factors, where `dropout_key` is set.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
    """

    base: jax.Array
    core: jax.Array
    in_0: jax.Array | None = None
    in_1: jax.Array | None = None
    in_2: jax.Array | None = None
    in_3: jax.Array | None = None
    out: jax.Array
    dropout_key: jax.Array | None = None
    scale: Scalar = 1.0
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "core": "stack rank",
        **dict.fromkeys(IN_FACTORS, "stack size rank"),
        "out": "stack rank out",
        "dropout_key": "stack",
        "scale": "",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def in_factors(self) -> tuple[jax.Array, ...]:
        """The factors of the input axes, in the role's order."""
        found = (getattr(self, name) for name in IN_FACTORS)
        return tuple(factor for factor in found if factor is not None)

    def change(self) -> jax.Array:
        """Returns what is added to `base`, of its shape, in float32."""
        factors = self.in_factors
        few, full = string.ascii_lowercase[: len(factors)], string.ascii_uppercase[: len(factors)]
        inputs = [f"...{big}{small}" for big, small in zip(full, few, strict=True)]
        formula = f"...{few}z,{''.join(f'{term},' for term in inputs)}...zZ->...{full}Z"
        wide = wide_dtype(self.dtype)
        arrays = [v.astype(wide) for v in (self.core, *factors, self.out)]
        arrays[0] = arrays[0] * self.scale.astype(wide)
        delta = jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST, optimize="optimal")
        return self.role.unmatrix(delta, self.shape)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the sum, added in float32."""
        one = self.with_frozen_stopped()
        total = one.base.astype(wide_dtype(one.dtype)) + one.change()
        return total.astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the small tensors, in the cheap order."""
        base, inner = operation.apply(x, self.base), drop_inputs(x, operation, self.dropout_key, self.dropout)
        if len(self.in_factors) == 1:
            return base + operation.product(inner, (self.in_factors[0], self.core, self.out), self.scale)
        y = None
        if isinstance(operation, Convolution) and not self.role.stack_axes:
            y = operation.through_features(inner, *self._small_kernel(operation), self.scale)
        return base + (operation.apply(inner, self.change().astype(operation.dtype)) if y is None else y)

    def _small_kernel(self, operation: Convolution) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factor of the input features, the kernel between few features, and the factor of the output."""
        into, _ = operation.feature_axes
        place = self.role.in_axes.index(into)
        kernel = self.core
        for i, factor in enumerate(self.in_factors):
            if i != place:
                # Expands the window's axis in its place.
                kernel = jnp.moveaxis(jnp.tensordot(kernel, factor, axes=(i, 1)), -1, i)
        inverse = sorted(range(self.ndim), key=self.role.order.__getitem__)
        return self.in_factors[place], jnp.transpose(kernel, inverse), self.out

    @property
    def formed(self) -> bool:
        """Whether it is a vector, which has an output axis only."""
        return not self.in_factors

    def with_key(self, key: jax.Array) -> Tucker:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        stack = self.core.shape[: len(self.role.stack_axes)]
        return dataclasses.replace(self, dropout_key=step_keys(key, stack))


def tucker_in_factors(factors: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Returns the factors of the input axes, in the role's order, by the names of the fields that hold them.

    Args:
      factors: of the input axes, in the role's order.

    Raises:
      RoleError: there are more than four.
    """
    if len(factors) > len(IN_FACTORS):
        raise RoleError(f"a kernel with {len(factors)} input axes; the most that are served is {len(IN_FACTORS)}.")
    return dict(zip(IN_FACTORS, factors, strict=False))
