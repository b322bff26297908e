"""A kernel that a model scales before it uses it: by one number, or along its inputs or its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core._errors import MaterializeError
from subspace_jax.core._interpret import Interpreter, rule
from subspace_jax.core._operation import Operation
from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._weight import Weight
from subspace_jax.core._weight_view import WeightView
from subspace_jax.linalg import wide_dtype


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescaled(Weight):
    r"""Stands for \(\operatorname{diag}(u)\, W \operatorname{diag}(v)\, c\) while a program runs; nothing keeps it.

    Attributes:
      inner: the weight.
      number: \(c\), a scalar, or None.
      inputs: \(u\), `[in]`, the same for all layers, or None.
      outputs: \(v\), `[out]`, the same for all layers, or None.
    """

    inner: Weight
    number: jax.Array | None = None
    inputs: jax.Array | None = None
    outputs: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {"number": "", "inputs": "in", "outputs": "out"}
    divisible: ClassVar[tuple[str, ...]] = ("in", "out")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight inside."""
        return self.inner.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the scaled array."""
        matrix = self.role.matrix(self.inner.materialize(wide_dtype(self.dtype)))
        if self.number is not None:
            matrix = matrix * self.number
        if self.inputs is not None:
            matrix = matrix * self.inputs[:, None]
        if self.outputs is not None:
            matrix = matrix * self.outputs
        return self.role.unmatrix(matrix, self.shape).astype(self.dtype if dtype is None else dtype)

    def answers(self, operation: Operation) -> bool:
        """Tells whether the weight inside answers an operation."""
        return self.inner.answers(operation)

    def leaf_paths(self, path: str) -> tuple[str, ...]:
        """Returns the paths of the weight inside."""
        return self.inner.leaf_paths(path)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Scales what the weight's inputs or outputs are in the operation."""
        depth = self.role.stack_shape(self.shape)

        def outputs_scaled(x: jax.Array) -> jax.Array:
            if self.outputs is None:
                return self.inner.contract(x, operation)
            vector = jnp.broadcast_to(self.outputs, (*depth, *self.outputs.shape))
            return operation.scale_outputs(x, vector, lambda x: self.inner.contract(x, operation))

        inputs = self.inputs

        def scaled(rows: jax.Array) -> jax.Array:
            return rows if inputs is None else rows * inputs.astype(rows.dtype)

        y = outputs_scaled(x) if inputs is None else operation.transform_inputs(x, scaled, scaled, outputs_scaled)
        if y is None:
            raise MaterializeError(
                f"{operation.name}: the model scales this weight of shape {self.shape} along its input axes "
                f"{self.role.in_axes} and then sums over some of them only. Leave this leaf out of the pattern."
            )
        return y if self.number is None else y * self.number.astype(y.dtype)


def _factor(value: WeightView, other: Any) -> dict[str, jax.Array] | None:
    """The field that an elementwise factor of a weight is; None where it varies along more than one side."""
    weight, role = value.weight, value.weight.role
    if isinstance(other, WeightView) or not weight.mergeable or not role.is_matrix:
        return None
    if jnp.size(other) == 1:
        return {"number": jnp.reshape(other, ())}
    # In the weight's order of axes; XLA's elementwise operations broadcast axes of size one.
    factor = jnp.transpose(other, [value.permutation.index(i) for i in range(weight.ndim)])
    varying = {i for i, n in enumerate(factor.shape) if n > 1}
    for name, axes in (("outputs", role.out_axes), ("inputs", role.in_axes)):
        if varying <= set(axes) and (name == "outputs" or role.kind == "dense"):
            side = jnp.transpose(factor, [*(i for i in range(weight.ndim) if i not in axes), *axes])
            sizes = [weight.shape[i] for i in axes]
            return {name: jnp.broadcast_to(side.reshape(side.shape[-len(axes) :]), sizes).reshape(-1)}
    return None


def _rescaled(value: WeightView, **factor: jax.Array) -> list[Any]:
    weight = value.weight
    fields: dict[str, Any] = {"role": weight.role, "dtype": weight.dtype, "trainable": ("inner", *factor), **factor}
    return [dataclasses.replace(value, weight=Rescaled(inner=weight, **fields))]


@rule("mul")
def _mul(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    left, right = operands
    value, other = (left, right) if isinstance(left, WeightView) else (right, left)
    factor = _factor(value, other)
    return None if factor is None else _rescaled(value, **factor)


@rule("div")
def _div(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value, other = operands
    factor = _factor(value, other) if isinstance(value, WeightView) else None
    return None if factor is None else _rescaled(value, **{name: 1 / v for name, v in factor.items()})


@rule("neg")
def _neg(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    factor = _factor(value, jnp.asarray(-1, value.dtype))
    return None if factor is None else _rescaled(value, **factor)
