"""What a model does with a weight: one operation, described so that the weight's parts can stand in for it."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from subspace_jax.core._errors import MaterializeError
from subspace_jax.core._labels import Labels, product
from subspace_jax.core._role import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use(abc.ABC):
    """One operation of a model on a weight and another operand `x`.

    Attributes:
      role: the weight's role.
      shape: the weight's shape.
      permutation: the model saw the weight's axes in this order.
      dtype: the model had cast the weight to this dtype.
      out_dtype: dtype of the operation's result.
      path: identity of this place in the model's program; equal calls have equal paths.
    """

    role: Role
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    dtype: Any
    out_dtype: Any
    path: tuple[int, ...]

    @abc.abstractmethod
    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own operation on `x` and an ordinary array of the weight's shape."""

    @abc.abstractmethod
    def _start(
        self, x: jax.Array, factor: jax.Array, labels: Labels, needed: set[str]
    ) -> tuple[jax.Array, Labels] | None:
        """Applies the operation to the first factor, with the labels of the result; None if it cannot."""

    def _meet(self, x: jax.Array, factor: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        """Prepares a later factor for the product with what came before; a lookup selects its slices."""
        del x
        return factor, labels

    @property
    @abc.abstractmethod
    def in_labels(self) -> Labels:
        """Labels of the axes of `x` (for a lookup: of the index) that the first product replaces."""

    @property
    @abc.abstractmethod
    def x_labels(self) -> Labels:
        """Labels of the axes of `x`; an axis that meets a weight axis has that axis' label."""

    @property
    @abc.abstractmethod
    def out_labels(self) -> Labels:
        """Labels of the axes of the result."""

    @property
    def weight_labels(self) -> Labels:
        """Labels of the weight's axes."""
        return tuple(f"w{i}" for i in range(len(self.shape)))

    def _role_labels(self, axes: Sequence[int]) -> Labels:
        return tuple(f"w{i}" for i in axes)

    @property
    def contracts_inputs(self) -> bool:
        """Whether the operation sums over the role's input axes, as a layer does (a tied output does not)."""
        return set(self._role_labels(self.role.in_axes)) <= set(self.in_labels)

    @property
    def contracts_outputs(self) -> bool:
        """Whether the operation sums over the role's output axes, as a tied output embedding does."""
        return set(self._role_labels(self.role.out_axes)) <= set(self.in_labels)

    def present(self, array: jax.Array) -> jax.Array:
        """Returns an array of the weight's shape as the model saw the weight: cast and permuted."""
        array = array.astype(self.dtype)
        if self.permutation == tuple(range(array.ndim)):
            return array
        return lax.transpose(array, self.permutation)

    def product(self, x: jax.Array, factors: Sequence[jax.Array], scale: Any = None) -> jax.Array:
        """Returns the operation on `x` and a product of factors, without forming the product.

        Args:
          x: the operation's other operand.
          factors: matrices `[*stack, m, n]` that lead from the role's input size to its output size, and vectors
            `[*stack, n]` that stand for diagonal matrices between them.
          scale: a number or scalar array that multiplies the result; applied to the smallest intermediate.

        Returns:
          An array like the operation's result.
        """
        chain = self._label(factors)
        if not self.contracts_inputs and self.contracts_outputs:
            chain = chain[::-1]
        factor, names = chain[0]
        started = self._start(x, factor.astype(self.dtype), names, self._needed_after(chain, 0))
        if started is None:
            return self.apply(x, _scaled(self.dense(factors), scale))
        current, labels = _scaled(started[0], scale), started[1]
        for i, (factor, names) in enumerate(chain[1:], start=1):
            factor, names = self._meet(x, factor.astype(self.dtype), names)
            needed = self._needed_after(chain, i)
            out = self.out_labels if i == len(chain) - 1 else _kept(labels, names, needed)
            current = product(current, labels, factor, names, out, precision=self._precision)
            labels = out
        if labels != self.out_labels:
            current = jnp.transpose(current, [labels.index(n) for n in self.out_labels])
        return current.astype(self.out_dtype)

    def _needed_after(self, chain: Sequence[tuple[jax.Array, Labels]], index: int) -> set[str]:
        return set(self.out_labels).union(*(names for _, names in chain[index + 1 :]))

    @property
    def _precision(self) -> Any:
        return None

    def _label(self, factors: Sequence[jax.Array]) -> list[tuple[jax.Array, Labels]]:
        """Unfolds each factor's matrix axes to the role's axes and labels every axis."""
        stack = self._role_labels(self.role.stack_axes)
        depth = len(stack)
        matrices = [f.ndim == depth + 2 for f in factors]
        bonds: list[tuple[Labels, tuple[int, ...]]] = [self._bond(self.role.in_axes)]
        for i, (factor, is_matrix) in enumerate(zip(factors, matrices, strict=True)):
            if is_matrix:
                ends = not any(matrices[i + 1 :])
                bonds.append(self._bond(self.role.out_axes) if ends else ((f"h{i}",), factor.shape[-1:]))
        labelled, bond = [], 0
        for factor, is_matrix in zip(factors, matrices, strict=True):
            names, sizes = bonds[bond]
            if is_matrix:
                bond += 1
                names, sizes = names + bonds[bond][0], sizes + bonds[bond][1]
            labelled.append((factor.reshape(*factor.shape[:depth], *sizes), stack + names))
        return labelled

    def _bond(self, axes: tuple[int, ...]) -> tuple[Labels, tuple[int, ...]]:
        return self._role_labels(axes), tuple(self.shape[i] for i in axes)

    def dense(self, factors: Sequence[jax.Array]) -> jax.Array:
        """Returns the array of the weight's shape that the factors multiply to."""
        return dense(factors, self.role, self.shape)

    def transform_inputs(
        self,
        x: jax.Array,
        function: Callable[[jax.Array], jax.Array],
        transposed: Callable[[jax.Array], jax.Array],
        contract: Callable[[jax.Array], jax.Array],
    ) -> jax.Array | None:
        """Returns `contract(x)` as if the weight were `T W`, with a linear map `T` of its inputs.

        Args:
          x: the operation's other operand.
          function: maps rows `[*stack, n, in]` to their product with `T`.
          transposed: maps rows to their product with the transpose of `T`, for a tied output.
          contract: the operation on `W`.

        Returns:
          The result; None where the operation neither contracts nor produces all input axes, as a convolution or a
          lookup does not.
        """
        labels = {*self._role_labels(self.role.stack_axes), *self._role_labels(self.role.in_axes)}
        if self.contracts_inputs and labels <= set(self.x_labels):
            return contract(self._map_rows(x, self.x_labels, function))
        if labels <= set(self.out_labels):
            return self._map_rows(contract(x), self.out_labels, transposed)
        return None

    def _map_rows(self, x: jax.Array, labels: Labels, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Applies a function of rows `[*stack, n, in]` to an array that has those axes among its own."""
        first, last = self._role_labels(self.role.stack_axes), self._role_labels(self.role.in_axes)
        order = [labels.index(n) for n in (*first, *(n for n in labels if n not in (*first, *last)), *last)]
        moved = jnp.transpose(x, order)
        size, _ = self.role.sizes(self.shape)
        joined = (*self.role.stack_shape(self.shape), -1, size)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        sharding = jax.typeof(moved).sharding
        if not sharding.mesh.explicit_axes:
            return jnp.transpose(function(moved.reshape(joined)).reshape(moved.shape), inverse)
        # Explicit axes: rows may be split along their first axis and the stack; what mixes inputs needs them whole.
        depth = len(first)
        kept = (*sharding.spec[: depth + 1], *(None,) * (moved.ndim - depth - 1))
        if len(labels) == depth + len(last):
            kept = (*sharding.spec[:depth], *(None,) * (moved.ndim - depth))
        whole = jax.sharding.reshard(moved, PartitionSpec(*kept))
        rows = jnp.reshape(whole, joined, out_sharding=PartitionSpec(*kept[: depth + 1], None))
        back = jnp.reshape(function(rows), moved.shape, out_sharding=PartitionSpec(*kept))
        return jnp.transpose(jax.sharding.reshard(back, sharding), inverse)

    def scale_outputs(self, x: jax.Array, vector: jax.Array, contract: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns `contract(x)` as if the weight's output features were scaled by `vector`.

        Args:
          x: the operation's other operand.
          vector: `[*stack, out]`.
          contract: the operation on the unscaled weight.
        """
        labels = self._role_labels(self.role.stack_axes)
        names, sizes = self._bond(self.role.out_axes)
        vector = vector.reshape(*vector.shape[: len(labels)], *sizes)
        vector, labels = self._meet(x, vector, labels + names)
        if set(labels) <= set(self.out_labels):
            y = contract(x)
            return product(y, self.out_labels, vector.astype(y.dtype), labels, self.out_labels)
        if set(labels) <= set(self.x_labels):
            return contract(product(x, self.x_labels, vector.astype(x.dtype), labels, self.x_labels))
        raise MaterializeError(
            f"A weight of shape {self.shape} with scaled output features {self.role.out_axes} is contracted over some "
            f"of them only, so neither the input ({', '.join(self.x_labels)}) nor the result "
            f"({', '.join(self.out_labels)}) can be scaled in its place. Use a method without magnitudes here, or "
            "merge() the weight."
        )


def dense(factors: Sequence[jax.Array], role: Role, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of `shape` that a chain of factors multiplies to.

    Args:
      factors: as for `Use.product`.
      role: the role that folds the product to `shape`.
      shape: shape of the result.
    """
    depth = len(role.stack_axes)
    first, *rest = factors
    total = first
    for factor in rest:
        if total.ndim == depth + 1:
            total = total[..., :, None] * factor
        elif factor.ndim == depth + 1:
            total = total * factor[..., None, :]
        else:
            total = jnp.matmul(total, factor, precision=lax.Precision.HIGHEST)
    return role.unmatrix(total, shape)


def _kept(labels: Labels, new: Labels, needed: set[str]) -> Labels:
    """Labels of a product in which only those needed later remain."""
    return tuple(n for n in dict.fromkeys((*labels, *new)) if n in needed)


def _scaled(array: jax.Array, scale: Any) -> jax.Array:
    return array if scale is None else array * jnp.asarray(scale, array.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot(Use):
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
        out = _kept(self.x_labels, labels, needed)
        return product(x, self.x_labels, factor, labels, out, precision=self._precision), out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(Use):
    """A `conv_general_dilated` of `x` with the weight as its kernel.

    Attributes:
      parameters: `lax.conv_general_dilated`'s keyword arguments, dimension numbers included.
    """

    parameters: dict[str, Any]

    def apply(self, x: jax.Array, array: jax.Array) -> jax.Array:
        """Returns the model's own convolution."""
        return lax.conv_general_dilated(x, self.present(array), **self.parameters).astype(self.out_dtype)

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
        grouped = self.parameters["feature_group_count"] > 1 or self.parameters["batch_group_count"] > 1
        new = [n for n in labels if n not in self.in_labels]
        if grouped or len(new) != 1 or len(labels) != len(self.shape):
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
class Lookup(Use):
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
