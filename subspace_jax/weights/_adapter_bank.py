"""A frozen array with several low-rank additions, of which each row of a batch uses its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Lookup, MaterializeError, Operation, Weight, register_weight, static
from subspace_jax.weights._lengths import column_lengths
from subspace_jax.weights._low_rank import LowRank


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterBank(Weight):
    r"""A frozen array with stacked low-rank additions: \((W + s_i\,a_i\,b_i)\,\mathrm{diag}(g_i)\) for adapter \(i\).

    Attributes:
      base: \(W\), or a weight that stands for it; one for all adapters.
      a: `[*stack, adapter, in, rank]`; adapters of lower rank are padded with zeros.
      b: `[*stack, adapter, rank, out]`.
      scale: \(s_i\), `[adapter]`.
      gain: \(g_i\), `[*stack, adapter, out]`, what DoRA multiplies columns with; 1 for adapters without. None if no
        adapter has any, or if `magnitude` learns.
      magnitude: lengths of the columns of adapters of DoRA, `[*stack, adapter, out]`, where they learn.
      has_magnitude: which adapters have them, `[adapter]`.
      row: \(i\), an int32 scalar, set by `per_row`.
      detach_norm: treat the norms of columns as constants in the backward pass.
    """

    base: jax.Array | Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    gain: jax.Array | None = None
    magnitude: jax.Array | None = None
    has_magnitude: jax.Array | None = None
    row: jax.Array | None = None
    detach_norm: bool = static(default=True)

    divisible: ClassVar[tuple[str, ...]] = ("in", "out")
    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "a": "stack adapter in rank",
        "b": "stack adapter rank out",
        "scale": "adapter",
        "gain": "stack adapter out",
        "magnitude": "stack adapter out",
        "has_magnitude": "adapter",
        "row": "",
    }
    mergeable: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The rank that all adapters are padded to."""
        return self.a.shape[-1]

    @property
    def slots(self) -> int:
        """The number of adapters, the plain base in slot 0 included."""
        return self.a.shape[-3]

    def one(self, row: Any) -> LowRank:
        """Returns the addition of one adapter on the base, without its gain."""
        a, b = self._pick(self.a, row), self._pick(self.b, row)
        fields: dict[str, Any] = {"role": self.role, "dtype": self.dtype, "trainable": ()}
        return LowRank(base=self.base, a=a, b=b, scale=jnp.take(self.scale, row), **fields)

    def gains(self) -> jax.Array | None:
        """Returns what multiplies the columns, `[*stack, adapter, out]`; None where nothing does."""
        if self.magnitude is None:
            return self.gain
        depth = len(self.role.stack_axes)

        def norm(number: jax.Array) -> jax.Array:
            return column_lengths(self.one(number), detach=self.detach_norm)

        # One after the other: side by side, every adapter's sum with the base would be formed.
        norms = jnp.moveaxis(jax.lax.map(norm, jnp.arange(self.slots)), 0, depth)
        found = self.magnitude.astype(norms.dtype) / norms
        return found if self.has_magnitude is None else jnp.where(self.has_magnitude[:, None], found, 1.0)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the base plus that on the factors of the adapter `row`."""
        self._check_row()
        gains = self.gains()

        def added(x: jax.Array) -> jax.Array:
            if isinstance(operation, Lookup) and operation.contracts_inputs and not self.role.stack_axes:
                return self._look_up(x, operation)
            return self.one(self.row).contract(x, operation)

        return added(x) if gains is None else operation.scale_outputs(x, self._pick(gains, self.row), added)

    def _look_up(self, x: jax.Array, operation: Lookup) -> jax.Array:
        """A lookup in all adapters' tables as one, so that no table is copied for a row of the batch."""
        words, index, row = self.a.shape[-2], x[..., 0], jnp.asarray(self.row)
        kept = jnp.clip(index, 0, words - 1)
        found = jnp.take(self.a.reshape(-1, self.rank), row * words + kept, axis=0)
        scale = jnp.take(self.scale, row).astype(found.dtype)
        # Outside of the table the base's own result stands: a fill value, which an addition must not change.
        found = found * jnp.where(operation.reads(index, words), scale, 0)[..., None]
        y = jnp.matmul(found.astype(operation.dtype), self._pick(self.b, row).astype(operation.dtype))
        base = self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)
        return base + operation.place(y).astype(base.dtype)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array of the adapter `row`, added in float32."""
        self._check_row()
        weight, gains = self.one(self.row), self.gains()
        if gains is None:
            return weight.materialize(self.dtype if dtype is None else dtype)
        matrix = self.role.matrix(weight.materialize(gains.dtype)) * self._pick(gains, self.row)[..., None, :]
        return self.role.unmatrix(matrix, self.shape).astype(self.dtype if dtype is None else dtype)

    def _pick(self, array: jax.Array, row: Any) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, row, len(self.role.stack_axes), keepdims=False)

    def _check_row(self) -> None:
        if self.row is None:
            raise MaterializeError(
                f"A bank of {self.slots} adapters of shape {self.shape} is used without saying which: run the model "
                "through sj.per_row(fn)(bank, rows, ...), or take one adapter out by sj.banks.take(bank, slot)."
            )
