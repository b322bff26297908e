"""A frozen array of which single entries learn, kept as lists of positions and of values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from subspace_jax.core import Operation, RoleError, Weight, register_weight, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights._entries import (
    blocks_of,
    entries_at,
    from_grid,
    gather_entries,
    in_grid,
    placed_as,
    scatter_entries,
)

SparseMode = Literal["set", "add"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDelta(Weight):
    r"""A frozen array of which a few entries are replaced ("set") or changed ("add") by trained values.

    The values, their gradient and the optimizer's state are lists of \(k\) numbers; no mask of the weight's size
    exists. A use forms the changed array, applies the model's operation and forgets the array: the backward pass
    keeps only the input, the list and the reference to \(W\), forms the array anew, and picks the \(k\) entries out
    of its gradient, which is a temporary of one layer.

    Positions count the entries of one layer's matrix `[in, out]` row by row (for an array that is not a matrix, its
    entries in order). A slot whose position is \(S\), the number of entries, is padding: it changes nothing.

    On a mesh the lists may be split over all devices (`sj.shardings` does so). A use then sends the lists, never the
    array: every device writes the entries that it holds. `SparseBlocks` sends nothing.

    Attributes:
      base: \(W\), of the weight's shape.
      indices: positions, ascending, `[*stack, k]` int32.
      values: what those entries are, or what is added to them, `[*stack, k]` float32.
      active: which values still learn, `[*stack, k]` bool; None for all. The others keep their value and get no
        gradient.
      mode: "set" or "add".
      keep_formed: keep the formed array for the backward pass. Right under rematerialization, where the forward pass
        runs again just before the backward one: the array is then formed, and on a mesh gathered, once for both.
    """

    base: jax.Array
    indices: jax.Array
    values: jax.Array
    active: jax.Array | None = None
    mode: SparseMode = static(default="set")
    keep_formed: bool = static(default=False)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "indices": "stack entry",
        "values": "stack entry",
        "active": "stack entry",
    }
    spread: ClassVar[Mapping[str, int]] = {"indices": -1, "values": -1, "active": -1}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def formed(self) -> bool:
        """True for vectors: biases and scales cost nothing to form, and are added rather than multiplied."""
        return self.ndim - len(self.role.stack_axes) <= 1

    @property
    def count(self) -> int:
        r"""\(k\), the number of slots of one layer."""
        return math.prod(self.indices.shape[len(self.role.stack_axes) :])

    def learning_size(self, name: str) -> int | None:
        """Returns how many values are active and not padding."""
        if name != "values" or self.indices is None:
            return None
        depth = len(self.role.stack_axes)
        blocks = math.prod(self.indices.shape[depth:-1])
        real = self.indices < self.size // math.prod(self.role.stack_shape(self.shape)) // blocks
        return int(jnp.sum(real if self.active is None else real & self.active))

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the values in their places, cast once; all other entries are those of `base`."""
        one = self.with_frozen_stopped()
        values = one.values
        if one.active is not None:
            values = jnp.where(one.active, values, lax.stop_gradient(values))
        return one._write(one.base, one.indices, values, self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the formed array, of which nothing is kept unless `keep_formed` says so."""

        @jax.custom_vjp
        def apply(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any) -> jax.Array:
            return forward(x, base, indices, values, active)[0]

        def forward(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any):
            # Barriers put the forming of the array behind its input: left free, the compiler forms the arrays of all
            # layers first, and keeps those of the forward pass for the backward one.
            behind, where, what = lax.optimization_barrier((x, indices, values))
            formed = self._write(base, where, what, operation.dtype)
            return operation.apply(behind, formed), (
                x,
                base,
                indices,
                values,
                active,
                formed if self.keep_formed else None,
            )

        def backward(saved: Any, cotangent: jax.Array):
            x, base, indices, values, active, formed = saved
            if formed is None:
                indices, values, cotangent = lax.optimization_barrier((indices, values, cotangent))
                formed = self._write(base, indices, values, operation.dtype)
            _, pull = jax.vjp(operation.apply, x, formed)
            x_cotangent, array_cotangent = pull(cotangent)
            picked = entries_at(array_cotangent, indices, self.role, like=values).astype(values.dtype)
            if active is not None:
                picked = jnp.where(active, picked, jnp.zeros((), picked.dtype))
            return x_cotangent, None, None, picked, None

        apply.defvjp(forward, backward)
        return apply(x, self.base, self.indices, self.values, self.active)

    def _write(self, base: jax.Array, indices: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
        """Forms the array, of `dtype`."""
        wide = wide_dtype(base.dtype)

        def write(base: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
            grid = in_grid(base, self.role, blocks_of(indices, self.role))
            if self.mode == "add":
                values = gather_entries(grid, indices).astype(wide) + values
            return from_grid(scatter_entries(grid.astype(dtype), indices, values.astype(dtype)), self.role, base.shape)

        return placed_as(write, base)(base, indices, values)

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> SparseDelta:
        """Returns partition specs of the parts; with `exact` refuses a split matrix where positions count all of it.

        Raises:
          RoleError: `exact`, and the array is split along an axis that is not stacked.
        """
        split = any(entry is not None for i, entry in enumerate(spec) if i not in self.role.stack_axes)
        if exact and split and self.spread:
            raise RoleError(
                f"SparseDelta of shape {self.shape}: split {spec}, but its positions count the whole matrix; select "
                "by blocks (for sj.lift: blocks=), or merge() the weight first."
            )
        return super().partition_specs(spec, exact=exact)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseBlocks(SparseDelta):
    r"""`SparseDelta` with one list per block of the matrix, so that each device needs only its own lists.

    The matrix is cut into `rows` times `cols` blocks of equal shape, all with the same number of slots. Where the
    weight is split over as many devices, or a divisor of it, on each side, writing the values and picking their
    gradients send nothing.

    Attributes:
      base: \(W\), a matrix or a stack of matrices.
      indices: positions in the block, row by row, ascending, `[*stack, rows, cols, k]` int32; padding is the number of
        a block's entries.
      values: `[*stack, rows, cols, k]` float32.
      active: `[*stack, rows, cols, k]` bool, or None.
      mode: "set" or "add".
      keep_formed: keep the formed array for the backward pass; right under rematerialization.
    """

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "indices": "stack in out entry",
        "values": "stack in out entry",
        "active": "stack in out entry",
    }
    spread: ClassVar[Mapping[str, int]] = {}
