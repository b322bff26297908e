"""A frozen array in the blocks of a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import Dot, Lookup, Operation, Weight, register_weight, static

from ._gguf_blocks import dequantize_rows
from ._stored import Stored

CHUNK = 1 << 22  # values of a large table that are formed at a time


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(Stored, Weight):
    """A frozen array in the quantized blocks of a GGUF file, which stay packed until they are used.

    A product forms the array, in the backward pass once more, or in chunks of rows where it is large and the rows
    remain in the result, as a head over tokens has them; a lookup forms the rows that it looks up. So `merge` gives
    the dense array that the file's blocks mean.

    Attributes:
      blocks: `[*stack, rows, bytes]` uint8; where layers are of several kinds, rows end in padding.
      kind: `[*stack]` int32, which of `kinds` the blocks of each layer are; None where they are of one.
      layer: number of the layer that the weight is of, inside a loop over layers: `blocks` and `kind` are those of all
        layers then, so that a backward pass keeps a number in place of a layer's blocks.
      kinds: names of the kinds, of `BLOCK_KINDS`.
      in_sizes: sizes of the role's input axes.
      out_sizes: sizes of the role's output axes.
      order: whether a row holds the inputs of one output ("out_in", kernels) or the outputs of one input ("in_out",
        tables that are looked up).
    """

    blocks: jax.Array
    kind: jax.Array | None = None
    layer: jax.Array | None = None
    kinds: tuple[str, ...] = static()
    in_sizes: tuple[int, ...] = static()
    out_sizes: tuple[int, ...] = static()
    order: Literal["out_in", "in_out"] = static(default="out_in")

    axes: ClassVar[Mapping[str, str]] = {"blocks": "stack row byte", "kind": "stack", "layer": ""}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the blocks hold."""
        stack = self.blocks.shape[:-2] if self.layer is None else ()
        return self.role.joined_shape(stack, self.in_sizes, self.out_sizes)

    @property
    def row_size(self) -> int:
        """The number of values of a row."""
        return math.prod(self.in_sizes if self.order == "out_in" else self.out_sizes)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the dequantized array."""
        one = self.with_frozen_stopped().alone()
        rows = _dequantize(one.kinds, one.row_size, one.blocks, one.kind)
        matrix = jnp.swapaxes(rows, -1, -2) if one.order == "out_in" else rows
        return one.role.unmatrix(matrix, one.shape).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the array, of which only what is needed at a time is formed."""
        axis = self._row_axis()
        if axis is not None and isinstance(operation, Lookup) and operation.in_labels == (f"w{axis}",):
            return self._look_up(x, operation)
        large = self.blocks.shape[-2] * self.row_size > CHUNK
        if axis is not None and large and isinstance(operation, Dot) and f"w{axis}" in operation.out_labels:
            return self._in_chunks(x, operation, operation.out_labels.index(f"w{axis}"))
        return super().contract(x, operation)

    def _row_axis(self) -> int | None:
        """The axis of the array that runs over rows, where there is just one."""
        axes = self.role.out_axes if self.order == "out_in" else self.role.in_axes
        return axes[0] if len(axes) == 1 and not self.role.stack_axes else None

    def split_stack(self, axis: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Packed]]:
        """Splits the layers by their numbers alone; see `Weight.split_stack`."""
        if self.role.stack_axes != (axis,):
            return super().split_stack(axis)
        role = self.role.without_stack_axis(axis)

        def rebuild(one: dict[str, Any]) -> Packed:
            return dataclasses.replace(self, role=role, **one)

        return {"layer": jnp.arange(self.blocks.shape[0], dtype=jnp.int32)}, rebuild

    def alone(self) -> Packed:
        """Returns the weight with the blocks of its own layer only."""
        if self.layer is None:
            return self
        index = functools.partial(lax.dynamic_index_in_dim, index=self.layer, axis=0, keepdims=False)
        kind = None if self.kind is None else index(self.kind)
        return dataclasses.replace(self, blocks=index(self.blocks), kind=kind, layer=None)

    def _rows(self, start: Any, count: int) -> Packed:
        """The weight of some of the rows."""
        one = self
        if self.layer is not None:  # in one step, so that no layer is copied for its rows
            place = (self.layer, start, 0)
            blocks = lax.dynamic_slice(self.blocks, place, (1, count, self.blocks.shape[-1]))[0]
            kind = None if self.kind is None else self.kind[self.layer]
            one = dataclasses.replace(self, kind=kind, layer=None)
        else:
            blocks = lax.dynamic_slice_in_dim(self.blocks, start, count, 0)
        sizes = {"out_sizes" if self.order == "out_in" else "in_sizes": (count,)}
        return dataclasses.replace(one, blocks=blocks, **sizes)

    def _look_up(self, x: jax.Array, operation: Lookup) -> jax.Array:
        one, index = self.with_frozen_stopped().alone(), x[..., 0]
        rows = jnp.take(one.blocks, index, axis=0, mode="clip")
        values = _dequantize(one.kinds, one.row_size, rows, one.kind)
        fill = operation.parameters.get("fill_value")
        inside = operation.reads(index, one.blocks.shape[0])[..., None]
        values = jnp.where(inside, values, jnp.nan if fill is None else fill)
        if self.order == "in_out":
            return operation.place(values).astype(operation.out_dtype)
        made = (*operation.x_labels, *(f"w{i}" for i in self.role.in_axes))
        values = values.reshape(*values.shape[:-1], *self.in_sizes)
        return jnp.transpose(values, [made.index(n) for n in operation.out_labels]).astype(operation.out_dtype)

    def _in_chunks(self, x: jax.Array, operation: Dot, place: int) -> jax.Array:
        """The product with some rows at a time, side by side along an axis of the result."""
        one = self.with_frozen_stopped()
        rows = one.blocks.shape[-2]
        chunk = max(1, CHUNK // one.row_size)
        even = 1 << (chunk.bit_length() - 1)
        chunk = chunk if rows % even else even  # without a rest the parts need not be joined
        count, rest = divmod(rows, chunk)

        def use(x: jax.Array, start: Any, size: int) -> jax.Array:
            return operation.apply(x, one._rows(start, size).materialize(operation.dtype))

        def step(carry: None, start: jax.Array) -> tuple[None, jax.Array]:
            return carry, jax.checkpoint(lambda x: use(x, start, chunk), prevent_cse=False)(x)

        parts = []
        if count:
            _, found = lax.scan(step, None, jnp.arange(count) * chunk)
            shape, moved = found.shape[1:], jnp.moveaxis(found, 0, place)
            parts.append(moved.reshape(*shape[:place], count * chunk, *shape[place + 1 :]))
        if rest:
            parts.append(jax.checkpoint(lambda x: use(x, count * chunk, rest))(x))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=place)

    def reshape(self, shape: tuple[int, ...]) -> Packed | None:
        """Returns the weight of the reshaped array."""
        moved = super().reshape(shape)
        if moved is None:
            return None
        return dataclasses.replace(moved, in_sizes=moved.role.in_shape(shape), out_sizes=moved.role.out_shape(shape))


def _dequantize(kinds: tuple[str, ...], values: int, blocks: jax.Array, kind: jax.Array | None) -> jax.Array:
    """Rows `[*stack, rows, bytes]` as float32 `[*stack, rows, values]`, layer by layer where their kinds differ."""
    if kind is None:
        return dequantize_rows(kinds[0], blocks, values)
    ways = [functools.partial(dequantize_rows, name, values=values) for name in kinds]
    if kind.ndim == 0:
        return lax.switch(kind, ways, blocks)
    flat = (kind.reshape(-1), blocks.reshape(-1, *blocks.shape[kind.ndim :]))
    found = lax.map(lambda one: lax.switch(one[0], ways, one[1]), flat)
    return found.reshape(*blocks.shape[:-1], values)
