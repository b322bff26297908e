"""How a model uses an array: which of its axes are stacked, contracted, and produced."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.core._errors import RoleError

Kind = Literal["dense", "conv", "embedding", "bias", "scale", "other", "unused"]


@dataclasses.dataclass(frozen=True)
class Role:
    """How a model reads an array: as matrices from inputs to outputs, a bias, a scale, or something else.

    An array with role `r` is a stack of matrices: `r.matrix(array)` has shape `[*stack, in, out]`, where `in` is
    the product of the input axes and `out` that of the output axes, each in the order listed.

    Attributes:
      kind: how the model uses the array. "bias" is added, "scale" is multiplied elementwise, "other" is any
        further use, "unused" means that nothing reads it.
      stack_axes: axes over which whole layers, experts or heads are stacked, one matrix each.
      in_axes: axes that the model contracts with its input.
      out_axes: axes that remain in the model's output.
      groups: feature groups of a convolution; 1 otherwise.
      uses: number of places where the model reads the array; above 1 the weight is shared.
      primitive: the operation that makes an array of kind "other" one, for messages; "add" for a scale to which a
        number is added before it multiplies.
      found: `sj.roles` found it, so that a role written by hand counts more.

    Example:
      >>> import jax.numpy as jnp
      >>> Role.dense(in_axes=(0,), out_axes=(1, 2)).matrix(jnp.zeros((8, 2, 4))).shape
      (8, 8)
    """

    kind: Kind
    stack_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    groups: int = 1
    uses: int = 1
    primitive: str = dataclasses.field(default="", compare=False)
    found: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def dense(cls, in_axes=(0,), out_axes=(1,), stack_axes=()) -> Role:
        """Returns the role of a kernel that is contracted over `in_axes`."""
        return cls("dense", tuple(stack_axes), tuple(in_axes), tuple(out_axes))

    @classmethod
    def conv(cls, ndim: int = 4, groups: int = 1, stack_axes=()) -> Role:
        """Returns the role of a Flax convolution kernel `[*stack, *window, in / groups, out]`."""
        first = len(stack_axes)
        axes = tuple(range(first, first + ndim))
        return cls("conv", tuple(stack_axes), axes[:-1], axes[-1:], groups)

    @classmethod
    def embedding(cls) -> Role:
        """Returns the role of a table `[vocabulary, features]` whose rows are looked up."""
        return cls("embedding", (), (0,), (1,))

    @property
    def is_matrix(self) -> bool:
        """Whether the array is a stack of matrices at all."""
        return bool(self.in_axes and self.out_axes)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the input and output size of one matrix of an array of this shape."""
        return math.prod(shape[i] for i in self.in_axes), math.prod(shape[i] for i in self.out_axes)

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the stacked axes of an array of this shape."""
        return tuple(shape[i] for i in self.stack_axes)

    def in_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the input axes of an array of this shape."""
        return tuple(shape[i] for i in self.in_axes)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the output axes of an array of this shape."""
        return tuple(shape[i] for i in self.out_axes)

    def joined_shape(
        self, stack: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Returns the shape of an array whose stacked, input and output axes have these sizes.

        >>> Role.dense(in_axes=(1,), out_axes=(0, 2)).joined_shape((), (5,), (2, 3))
        (2, 5, 3)
        """
        return tuple(size for _, size in sorted(zip(self.order, (*stack, *inputs, *outputs), strict=True)))

    @property
    def order(self) -> tuple[int, ...]:
        """The array's axes in the order stack, in, out."""
        return self.stack_axes + self.in_axes + self.out_axes

    def matrix(self, array: jax.Array) -> jax.Array:
        """Returns `array` as `[*stack, in, out]`.

        Args:
          array: an array of this role, any dtype.

        Raises:
          RoleError: the axes of the role are not exactly those of the array.
        """
        self.check(array.shape)
        return jnp.transpose(array, self.order).reshape(*self.stack_shape(array.shape), *self.sizes(array.shape))

    def unmatrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns the array of `shape` whose `matrix` is the given one; the inverse of `matrix`."""
        unfolded = matrix.reshape([shape[i] for i in self.order])
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(unfolded, inverse)

    def check(self, shape: tuple[int, ...], path: str = "the array") -> None:
        """Raises RoleError unless the role's axes are exactly those of an array of `shape`."""
        if not self.is_matrix:
            used = f" (the model uses it in {self.primitive!r})" if self.primitive else ""
            raise RoleError(
                f"{path}: shape {shape} has the role {self.kind!r}{used}, which is no matrix from inputs to outputs; "
                "leave it out of the pattern, train it as it is with full(), or, where the model makes a kernel of it, "
                "say of which axes by roles={path: sj.Role.dense(in_axes=..., out_axes=...)} and run the model by "
                'with_adapters(fn, on_materialize="allow").'
            )
        if sorted(self.order) != list(range(len(shape))):
            raise RoleError(
                f"{path}: role axes stack={self.stack_axes} in={self.in_axes} out={self.out_axes} do not cover "
                f"the {len(shape)} axes of shape {shape} once each; take the role from roles(fn, params, ...)."
            )

    def without_stack_axis(self, axis: int) -> Role:
        """Returns the role of one slice of the array along the stacked `axis`."""

        def shift(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i - (i > axis) for i in axes if i != axis)

        return dataclasses.replace(
            self,
            stack_axes=shift(self.stack_axes),
            in_axes=shift(self.in_axes),
            out_axes=shift(self.out_axes),
        )
