"""An operation of a model on a weight, described so that the weight can answer it from its parts."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core._context import Context
from subspace_jax.core._errors import MaterializeError
from subspace_jax.core._labels import Labels, aligned, map_rows, placed_by_label, product
from subspace_jax.core._role import Role
from subspace_jax.linalg import is_narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(abc.ABC):
    """One operation of a model on a weight and another operand `x`.

    Attributes:
      role: the weight's role.
      shape: the weight's shape.
      permutation: the model saw the weight's axes in this order.
      dtype: the model had cast the weight to this dtype.
      out_dtype: dtype of the operation's result.
      path: identity of this place in the model's program; equal calls have equal paths.
      context: the state that stand-ins share along the program, and what they report.
      name: path of the weight in the arguments, for reports.
    """

    role: Role
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    dtype: Any
    out_dtype: Any
    path: tuple[int, ...]
    context: Context = dataclasses.field(default_factory=Context, compare=False)
    name: str = ""

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
        """Labels of the axes of `x`; an axis that is contracted or batched with a weight axis has its label."""

    @property
    @abc.abstractmethod
    def out_labels(self) -> Labels:
        """Labels of the axes of the result."""

    @property
    def batch_labels(self) -> Labels:
        """Labels of the weight's axes that are batch axes of the operation."""
        return ()

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
            out = self.out_labels if i == len(chain) - 1 else kept(labels, names, needed)
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
        labeled, bond = [], 0
        for factor, is_matrix in zip(factors, matrices, strict=True):
            names, sizes = bonds[bond]
            if is_matrix:
                bond += 1
                names, sizes = names + bonds[bond][0], sizes + bonds[bond][1]
            labeled.append((factor.reshape(*factor.shape[:depth], *sizes), stack + names))
        return labeled

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
        stack, inputs = self.role.stack_axes, self.role.in_axes
        labels = {*self._role_labels(stack), *self._role_labels(inputs)}
        if self.contracts_inputs and labels <= set(self.x_labels):
            return contract(self._map_rows(x, self.x_labels, function, inputs, inputs, self.x_labels))
        if labels <= set(self.out_labels):
            return self._map_rows(contract(x), self.out_labels, transposed, inputs, inputs, self.out_labels)
        return None

    def linear(
        self,
        x: jax.Array,
        function: Callable[[jax.Array], jax.Array],
        transposed: Callable[[jax.Array], jax.Array],
    ) -> jax.Array | None:
        """Returns the operation on a weight that is known by what it does to rows, and is never formed.

        Args:
          x: the operation's other operand.
          function: maps rows `[*stack, n, in]` to their product with the weight's matrix, `[*stack, n, out]`.
          transposed: maps rows `[*stack, n, out]` to their product with its transpose, for a tied output.

        Returns:
          The result; None unless the operation is a product over all of the weight's inputs (or, tied, outputs).
        """
        stack, inputs, outputs = self.role.stack_axes, self.role.in_axes, self.role.out_axes
        if not self.contracts_inputs and self.contracts_outputs:
            function, inputs, outputs = transposed, outputs, inputs
        taken, given = ({*self._role_labels(stack), *self._role_labels(axes)} for axes in (inputs, outputs))
        if not taken <= set(self.x_labels) or not given <= set(self.out_labels):
            return None
        return self._map_rows(x, self.x_labels, function, inputs, outputs, self.out_labels).astype(self.out_dtype)

    def _map_rows(
        self,
        x: jax.Array,
        labels: Labels,
        function: Callable[[jax.Array], jax.Array],
        inputs: Sequence[int],
        outputs: Sequence[int],
        out_labels: Labels,
    ) -> jax.Array:
        """Applies a function of rows `[*stack, n, inputs]`, which gives `[*stack, n, outputs]`, to a labeled array."""
        stack, first, last = self.role.stack_axes, self._role_labels(self.role.stack_axes), self._role_labels(inputs)
        rest = [n for n in labels if n not in (*first, *last)]
        moved = jnp.transpose(x, [labels.index(n) for n in (*first, *rest, *last)])
        between = [x.shape[labels.index(n)] for n in rest]
        shape = (*self.role.stack_shape(self.shape), *between, *(self.shape[i] for i in outputs))
        mapped = map_rows(moved, function, depth=len(stack), width=len(last), shape=shape)
        made = (*first, *rest, *self._role_labels(outputs))
        return placed_by_label(jnp.transpose(mapped, [made.index(n) for n in out_labels]), out_labels, x, labels)

    def scale_outputs(self, x: jax.Array, vector: jax.Array, contract: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns `contract(x)` as if the weight's output features were scaled by `vector`.

        Args:
          x: the operation's other operand.
          vector: `[*stack, out]`.
          contract: the operation on the unscaled weight.

        Raises:
          MaterializeError: the operation contracts some of the output features and keeps others.
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

    def add_outputs(self, y: jax.Array, vector: jax.Array) -> jax.Array:
        """Returns the operation's result `y` with a vector added to its output features, as a bias is.

        Args:
          y: what the operation gave.
          vector: `[*stack, out]`.

        Raises:
          MaterializeError: the operation sums over output features, as a tied output embedding does.
        """
        labels = self._role_labels(self.role.stack_axes)
        names, sizes = self._bond(self.role.out_axes)
        vector, labels = vector.reshape(*vector.shape[: len(labels)], *sizes), labels + names
        if not self.contracts_inputs or not set(labels) <= set(self.out_labels):
            raise MaterializeError(
                f"A weight of shape {self.shape} with shifted output features {self.role.out_axes} is used in a way "
                f"whose result ({', '.join(self.out_labels)}) has not all of them. Leave this weight out."
            )
        return y + aligned(vector, labels, self.out_labels).astype(y.dtype)


def dense(factors: Sequence[jax.Array], role: Role, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of `shape` that a chain of factors multiplies to.

    Args:
      factors: matrices `[*stack, m, n]`, and vectors `[*stack, n]` that stand for diagonal matrices between them; those
        of 16 bits are multiplied as they are, wider ones in full precision.
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
            narrow = is_narrow(jnp.promote_types(total.dtype, factor.dtype))
            total = jnp.matmul(total, factor, precision=None if narrow else lax.Precision.HIGHEST)
    return role.unmatrix(total, shape)


def kept(labels: Labels, new: Labels, needed: set[str]) -> Labels:
    """Labels of a product in which only those needed later remain."""
    return tuple(n for n in dict.fromkeys((*labels, *new)) if n in needed)


def _scaled(array: jax.Array, scale: Any) -> jax.Array:
    return array if scale is None else array * jnp.asarray(scale, array.dtype)
