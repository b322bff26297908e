"""The operations of models on weights: products, convolutions and lookups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core._labels import Labels, product
from subspace_jax.core._operation import Operation, kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot(Operation):
    """A `dot_general` of `x` and the weight.

    Attributes:
      dimension_numbers: as `lax.dot_general` takes them, for the operands in the model's order.
      weight_first: whether the weight is the left operand.
      x_ndim: number of axes of `x`.
      parameters: `lax.dot_general`'s other keyword arguments.
    """

    dimension_numbers: tuple[Any, Any]
    weight_first: bool
    x_ndim: int
    parameters: dict[str, Any]

    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own `dot_general`."""
        operands = (self.present(array), x) if self.weight_first else (x, self.present(array))
        return lax.dot_general(*operands, self.dimension_numbers, **self.parameters).astype(self.out_dtype)

    @property
    def _sides(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Contracted and batch axes, of the weight as the model saw it and of `x`."""
        (left, right), (left_batch, right_batch) = self.dimension_numbers
        sides = (tuple(left), tuple(left_batch)), (tuple(right), tuple(right_batch))
        return sides if self.weight_first else (sides[1], sides[0])

    @property
    def _seen(self) -> Labels:
        return tuple(f"w{i}" for i in self.permutation)

    @property
    def in_labels(self) -> Labels:
        """Labels of the weight's contracted axes."""
        (contracted, _), _ = self._sides
        return tuple(self._seen[i] for i in contracted)

    @property
    def batch_labels(self) -> Labels:
        """Labels of the weight's axes that are batch axes of the product."""
        (_, batch), _ = self._sides
        return tuple(self._seen[i] for i in batch)

    @property
    def x_labels(self) -> Labels:
        """Labels of the axes of `x`."""
        (contracted, batch), (x_contracted, x_batch) = self._sides
        names = {i: self._seen[j] for i, j in zip(x_contracted + x_batch, contracted + batch, strict=True)}
        return tuple(names.get(i, f"x{i}") for i in range(self.x_ndim))

    @property
    def out_labels(self) -> Labels:
        """Labels of the result: batch, then the free axes of both operands in the model's order."""
        taken = {*self.in_labels, *self.batch_labels}
        x_free = [n for n in self.x_labels if n not in taken]
        weight_free = [n for n in self._seen if n not in taken]
        free = itertools.chain(weight_free, x_free) if self.weight_first else itertools.chain(x_free, weight_free)
        return (*self.batch_labels, *free)

    @property
    def _precision(self) -> Any:
        return self.parameters.get("precision")

    def _start(
        self, x: jax.Array, factor: jax.Array, labels: Labels, needed: set[str]
    ) -> tuple[jax.Array, Labels] | None:
        out = kept(self.x_labels, labels, needed)
        return product(x, self.x_labels, factor, labels, out, precision=self._precision), out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(Operation):
    """A `conv_general_dilated` of `x` with the weight as its kernel.

    Attributes:
      parameters: `lax.conv_general_dilated`'s keyword arguments, dimension numbers included.
    """

    parameters: dict[str, Any]

    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own convolution."""
        return lax.conv_general_dilated(x, self.present(array), **self.parameters).astype(self.out_dtype)

    def through_features(
        self, x: jax.Array, into: jax.Array, kernel: jax.Array, out_of: jax.Array, scale: Any = None
    ) -> jax.Array | None:
        """Returns the operation on a kernel that reads and writes few features, between two products over features.

        Args:
          x: the image.
          into: `[in features, few]`.
          kernel: like the weight, with few features in place of both of its feature axes.
          out_of: `[few, out features]`.
          scale: a number that multiplies the kernel.

        Returns:
          The result; None for a grouped convolution, whose features do not mix.
        """
        if not self.mixes_features:
            return None
        labels, last = self.x_labels, self._spec.lhs_spec[1]
        few = tuple("few" if i == last else n for i, n in enumerate(labels))
        x = product(x, labels, into.astype(self.dtype), (labels[last], "few"), few, precision=self._precision)
        kernel = kernel if scale is None else kernel * jnp.asarray(scale, kernel.dtype)
        y = lax.conv_general_dilated(x, self.present(kernel), **self.parameters)
        made = tuple("few" if n == self._out_label else n for n in self.out_labels)
        out_of = out_of.astype(self.dtype)
        y = product(y, made, out_of, ("few", self._out_label), self.out_labels, precision=self._precision)
        return y.astype(self.out_dtype)

    @property
    def mixes_features(self) -> bool:
        """Whether every output feature reads all input features: the convolution is not grouped."""
        return self.parameters["feature_group_count"] == 1 and self.parameters["batch_group_count"] == 1

    @property
    def x_feature(self) -> int:
        """The image's axis of features."""
        return self._spec.lhs_spec[1]

    @property
    def feature_axes(self) -> tuple[int, int]:
        """The weight's axes of input and of output features."""
        return self.permutation[self._spec.rhs_spec[1]], self.permutation[self._spec.rhs_spec[0]]

    @property
    def _spec(self) -> Any:
        return self.parameters["dimension_numbers"]

    @property
    def _out_label(self) -> str:
        return f"w{self.permutation[self._spec.rhs_spec[0]]}"

    @property
    def in_labels(self) -> Labels:
        """Labels of the kernel's window and input axes."""
        return tuple(n for n in self.weight_labels if n != self._out_label)

    @property
    def x_labels(self) -> Labels:
        """Labels of the image's axes; the window slides, so none is the weight's."""
        return tuple(f"x{i}" for i in range(len(self._spec.lhs_spec)))

    @property
    def out_labels(self) -> Labels:
        """Labels of the result's axes."""
        features = self._spec.out_spec[1]
        return tuple(self._out_label if i == features else f"y{i}" for i in range(len(self._spec.out_spec)))

    def _start(
        self, x: jax.Array, factor: jax.Array, labels: Labels, needed: set[str]
    ) -> tuple[jax.Array, Labels] | None:
        new = [n for n in labels if n not in self.in_labels]
        if not self.mixes_features or len(new) != 1 or len(labels) != len(self.shape):
            return None
        # The factor's kernel has its hidden axis where the model's kernel has its output axis.
        order = [new[0] if n == self._out_label else n for n in self.weight_labels]
        kernel = self.present(jnp.transpose(factor, [labels.index(n) for n in order]))
        y = lax.conv_general_dilated(x, kernel, **self.parameters)
        return y, tuple(new[0] if n == self._out_label else n for n in self.out_labels)

    @property
    def _precision(self) -> Any:
        precision = self.parameters.get("precision")
        return precision[0] if isinstance(precision, tuple) else precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Operation):
    """A gather of whole slices of the weight along one axis, as an embedding does; `x` holds the indices.

    Attributes:
      axis: the weight's axis that is looked up, as the model saw it.
      x_ndim: number of axes of the indices, without the trailing index axis.
      offset_dims: positions of the weight's remaining axes in the result.
      parameters: `lax.gather`'s mode and fill value.
    """

    axis: int
    x_ndim: int
    offset_dims: tuple[int, ...]
    parameters: dict[str, Any]

    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own gather; rows are cast after it, not the whole table before it."""
        seen = array if self.permutation == tuple(range(array.ndim)) else jnp.transpose(array, self.permutation)
        return self._gather(x, seen, self.axis, self.offset_dims).astype(self.out_dtype)

    def _gather(self, x: jax.Array, array: jax.Array, axis: int, offset_dims: Sequence[int]) -> jax.Array:
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(offset_dims), collapsed_slice_dims=(axis,), start_index_map=(axis,)
        )
        sizes = tuple(1 if i == axis else n for i, n in enumerate(array.shape))
        return lax.gather(array, x, numbers, sizes, **self.parameters)

    def reads(self, index: jax.Array, size: int) -> jax.Array:
        """Tells which indices read the table of `size` entries; those outside are clipped, or give the fill value."""
        inside = (index >= 0) & (index < size)
        return inside | (self.parameters["mode"] != lax.GatherScatterMode.FILL_OR_DROP)

    def place(self, rows: jax.Array) -> jax.Array:
        """Returns rows `[*index, out]` as the operation's result has its axes."""
        names, sizes = self._bond(self.role.out_axes)
        made = (*self.x_labels, *names)
        unfolded = rows.reshape(*rows.shape[:-1], *sizes)
        return jnp.transpose(unfolded, [made.index(n) for n in self.out_labels])

    @property
    def in_labels(self) -> Labels:
        """Label of the axis that is looked up."""
        return (f"w{self.permutation[self.axis]}",)

    @property
    def x_labels(self) -> Labels:
        """Labels of the index axes."""
        return tuple(f"x{i}" for i in range(self.x_ndim))

    @property
    def out_labels(self) -> Labels:
        """Labels of the result's axes."""
        rest = iter(f"w{i}" for i in self.permutation if f"w{i}" not in self.in_labels)
        index = iter(self.x_labels)
        count = self.x_ndim + len(self.offset_dims)
        return tuple(next(rest) if i in self.offset_dims else next(index) for i in range(count))

    def _start(
        self, x: jax.Array, factor: jax.Array, labels: Labels, needed: set[str]
    ) -> tuple[jax.Array, Labels] | None:
        return self._meet(x, factor, labels) if self.in_labels[0] in labels else None

    def _meet(self, x: jax.Array, factor: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        looked_up = self.in_labels[0]
        if looked_up not in labels:
            return factor, labels
        rest = [n for n in labels if n != looked_up]
        positions = range(self.x_ndim, self.x_ndim + len(rest))
        return self._gather(x, factor, labels.index(looked_up), positions), (*self.x_labels, *rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedDot(Operation):
    """A `ragged_dot` of rows sorted by group and a stack of matrices `[group, in, out]`, as experts are.

    Attributes:
      group_sizes: number of rows of each group; rows beyond their sum are in none and give zeros.
      parameters: `lax.ragged_dot`'s keyword arguments.
    """

    group_sizes: jax.Array
    parameters: dict[str, Any]

    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own product."""
        return lax.ragged_dot(x, self.present(array), self.group_sizes, **self.parameters).astype(self.out_dtype)

    def product(self, x: jax.Array, factors: Sequence[jax.Array], scale: Any = None) -> jax.Array:
        """Returns the rows times a product of factors, one ragged product after the other."""
        current = x
        for i, factor in enumerate(factors):
            if factor.ndim == 3:
                current = lax.ragged_dot(current, factor.astype(self.dtype), self.group_sizes, **self.parameters)
            else:
                current = current * self._of_rows(factor, current)
            if i == 0 and scale is not None:
                current = current * jnp.asarray(scale, current.dtype)
        return current.astype(self.out_dtype)

    def scale_outputs(self, x: jax.Array, vector: jax.Array, contract: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns `contract(x)` with every row's features scaled by its group's vector."""
        y = contract(x)
        return y * self._of_rows(vector, y)

    def _of_rows(self, vectors: jax.Array, rows: jax.Array) -> jax.Array:
        """The vector of every row's group, `[rows, features]`."""
        ends = jnp.cumsum(self.group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
        return jnp.take(vectors, group, axis=0, mode="clip").astype(rows.dtype)

    @property
    def batch_labels(self) -> Labels:
        """Label of the weight's axis over groups."""
        return self.weight_labels[:1]

    @property
    def in_labels(self) -> Labels:
        """Label of the contracted axis."""
        return self.weight_labels[1:2]

    @property
    def x_labels(self) -> Labels:
        """Labels of the rows and of their features."""
        return ("x0", *self.in_labels)

    @property
    def out_labels(self) -> Labels:
        """Labels of the rows and of the result's features."""
        return ("x0", self.weight_labels[2])

    def _start(self, x: jax.Array, factor: jax.Array, labels: Labels, needed: set[str]) -> None:
        del x, factor, labels, needed
