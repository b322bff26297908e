"""A frozen array of which whole rows or whole columns learn, as a small dense matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import Dot, Operation, Weight, register_weight, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import placed_as

Parameterization = Literal["delta", "in_place"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSlice(Weight):
    r"""A frozen array of which a few rows (input features) or columns (output features) are trained densely.

    Rows: \(x W + x_{sel}\,\Delta\), so that of the input only the slice \(x_{sel}\) is kept for the gradient.
    Columns: \(x W\) with \(x \Delta\) added to the selected outputs. No gradient of the size of \(W\) is formed.

    Attributes:
      base: \(W\), of the weight's shape, or a weight that stands for it.
      rows: what is trained of the selected rows, `[*stack, slots, out]` float32; None where columns learn.
      columns: likewise of columns, `[*stack, in, slots]`.
      selected: which rows or columns, `[*stack, slots]` int32; None for `slots` neighbors from `start` on. A slot
        that holds the number of rows (columns) is padding and does nothing.
      start: the first of the neighbors.
      parameterization: "delta" trains the change; "in_place" the rows or columns themselves.
    """

    base: jax.Array | Weight
    rows: jax.Array | None = None
    columns: jax.Array | None = None
    selected: jax.Array | None = None
    start: int = static(default=0)
    parameterization: Parameterization = static(default="delta")

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "rows": "stack slot out",
        "columns": "stack in slot",
        "selected": "stack slot",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def slots(self) -> int:
        """The number of rows or columns that learn, padding included."""
        return self._trained.shape[-2 if self.rows is not None else -1]

    def positions(self) -> jax.Array:
        """Returns which rows or columns learn, `[*stack, slots]` int32."""
        if self.selected is not None:
            return self.selected
        stack = self.role.stack_shape(self.shape)
        return jnp.broadcast_to(jnp.arange(self.start, self.start + self.slots, dtype=jnp.int32), (*stack, self.slots))

    def learning_size(self, name: str) -> int | None:
        """Returns the number of values in slots that are not padding."""
        if name not in ("rows", "columns") or self.selected is None:
            return None
        inputs, outputs = self.role.sizes(self.shape)
        size, width = (inputs, outputs) if name == "rows" else (outputs, inputs)
        return int(jnp.sum(self.selected < size)) * width

    def change(self) -> jax.Array:
        """Returns what is added to the selected rows or columns, in float32."""
        trained = self._trained.astype(wide_dtype(self._trained.dtype))
        if self.parameterization == "delta":
            return trained
        base = self.base.materialize() if isinstance(self.base, Weight) else self.base

        def own(base: jax.Array, selected: jax.Array | None) -> jax.Array:
            one = dataclasses.replace(self, selected=selected)
            matrix = self.role.matrix(base).astype(trained.dtype)
            if self.rows is None:
                return one._select(matrix)
            return jnp.swapaxes(one._select(jnp.swapaxes(matrix, -1, -2)), -1, -2)

        return trained - placed_as(own, trained)(lax.stop_gradient(base), self.selected)

    def holding_itself(self) -> DenseSlice:
        """Returns the weight with the base's own rows or columns in place of what is trained."""
        field = "rows" if self.rows is not None else "columns"
        zeros = dataclasses.replace(self, **{field: jnp.zeros_like(self._trained)}, parameterization="in_place")
        return dataclasses.replace(zeros, **{field: -zeros.change()})

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the change added in float32, cast once."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        base = one.base.materialize(wide) if isinstance(one.base, Weight) else one.base
        change = one.change().astype(wide)
        inputs, outputs = one.role.sizes(one.shape)
        if one.rows is not None:
            delta = jnp.swapaxes(one._place(jnp.swapaxes(change, -1, -2), inputs), -1, -2)
        else:
            delta = one._place(change, outputs)
        total = base.astype(wide) + one.role.unmatrix(delta, one.shape)
        return total.astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the selected rows or columns."""
        base = self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)
        inputs, outputs = self.role.sizes(self.shape)
        change = self.change().astype(operation.dtype)
        back = jnp.swapaxes(change, -1, -2)
        precision = operation.parameters.get("precision") if isinstance(operation, Dot) else None

        def times(left: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.matmul(left, right, precision=precision)

        if self.rows is not None:
            y = operation.linear(
                x, lambda rows: times(self._select(rows), change), lambda rows: self._place(times(rows, back), inputs)
            )
            chain = (self._one_hot(inputs, operation.dtype), change)
        else:
            y = operation.linear(
                x, lambda rows: self._place(times(rows, change), outputs), lambda rows: times(self._select(rows), back)
            )
            chain = (change, jnp.swapaxes(self._one_hot(outputs, operation.dtype), -1, -2))
        return base + (operation.product(x, chain) if y is None else y)

    @property
    def _trained(self) -> jax.Array:
        trained = self.rows if self.rows is not None else self.columns
        if trained is None:
            raise ValueError("DenseSlice has neither rows nor columns; pass the tree that combine() gives.")
        return trained

    def _select(self, rows: jax.Array) -> jax.Array:
        """Takes the selected features of `[*stack, n, features]`; 0 at padding."""
        if self.selected is None:
            return lax.slice_in_dim(rows, self.start, self.start + self.slots, axis=-1)

        def of_one(rows: jax.Array, selected: jax.Array) -> jax.Array:
            return rows.at[..., selected].get(mode="fill", fill_value=0)

        return jnp.vectorize(of_one, signature="(n,f),(s)->(n,s)")(rows, self.selected)

    def _place(self, rows: jax.Array, size: int) -> jax.Array:
        """Puts the slots of `[*stack, n, slots]` at their features, `[*stack, n, size]`; those met twice add up."""
        if self.selected is None:
            after = size - self.start - self.slots
            return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(self.start, after)])

        def of_one(rows: jax.Array, selected: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(rows, shape=(rows.shape[0], size))
            return zeros.at[:, selected].add(rows, mode="drop")

        return placed_as(jnp.vectorize(of_one, signature="(n,s),(s)->(n,f)"), rows)(rows, self.selected)

    def _one_hot(self, size: int, dtype: Any) -> jax.Array:
        """The selection as a matrix `[*stack, size, slots]`."""
        return (jnp.arange(size)[:, None] == self.positions()[..., None, :]).astype(dtype)
