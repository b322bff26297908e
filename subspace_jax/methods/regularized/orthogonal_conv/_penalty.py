"""How far a convolution is from an isometry, told by its kernel alone, whatever the size of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import RoleError, check_choice, check_int
from subspace_jax.linalg import whole_matrices, wide_dtype

Strides = int | Sequence[int]


class Convolved(NamedTuple):
    """Sizes of a convolution.

    Attributes:
      window: taps along each spatial axis.
      inputs: input features, of one group.
      outputs: output features, of one group.
      strides: along each spatial axis.
      groups: of features.
    """

    window: tuple[int, ...]
    inputs: int
    outputs: int
    strides: tuple[int, ...]
    groups: int

    @property
    def reach(self) -> tuple[int, ...]:
        """Shifts, in strides, at which the kernel still meets itself."""
        return tuple((k - 1) // s for k, s in zip(self.window, self.strides, strict=True))

    @property
    def has_orthogonal_rows(self) -> bool:
        """Whether an orthogonal operator would have orthonormal rows; else it has orthonormal columns."""
        return self.outputs <= self.inputs * math.prod(self.strides)


def sizes_of(shape: Sequence[int], strides: Strides = 1, groups: int = 1) -> Convolved:
    """Returns the sizes of a kernel's shape `[*window, in, out]`.

    Raises:
      RoleError: no window, or strides of another number of axes.
      RankError: a stride or the number of groups is no positive integer.
    """
    *window, inputs, outputs = shape
    steps = (strides,) * len(window) if isinstance(strides, int) else tuple(strides)
    if not window or len(steps) != len(window):
        raise RoleError(
            f"orthogonal_conv: a kernel of shape {tuple(shape)} with strides={strides!r}: expected [*window, in, out] "
            "and a stride for each axis of the window."
        )
    steps = tuple(check_int("orthogonal_conv: stride", s) for s in steps)
    groups = check_int("orthogonal_conv: groups", groups)
    if outputs % groups:
        raise RoleError(f"orthogonal_conv: {outputs} output features are not {groups} groups of one size.")
    return Convolved(tuple(window), inputs, outputs // groups, steps, groups)


def self_convolution(kernel: jax.Array, strides: Strides = 1) -> jax.Array:
    r"""Returns the kernel's products with itself, shifted by multiples of the stride.

    Entry \((i, u, j)\) is \(\sum_{a, c} K_{a, c, i}\,K_{a + S (u - q), c, j}\), up to the sign of the shift, with
    \(q = \lfloor (k - 1) / S \rfloor\); an orthogonal kernel gives the identity at \(u = q\) and zeros elsewhere.

    Args:
      kernel: `[*window, in, out]`.
      strides: of the layer.

    Returns:
      `[out, *(2 q + 1), out]`.

    Example:
      >>> import jax.numpy as jnp
      >>> self_convolution(jnp.ones((2, 1, 1))).ravel().tolist()
      [1.0, 2.0, 1.0]
    """
    sizes = sizes_of(kernel.shape, strides)
    kernel = whole_matrices(kernel.astype(wide_dtype(kernel.dtype)))  # small, and a convolution does not say its layout
    padding = [(q * s, q * s) for q, s in zip(sizes.reach, sizes.strides, strict=True)]
    letters = "XYZ"[: len(sizes.window)]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    images = jnp.moveaxis(kernel, -1, 0)
    return lax.conv_general_dilated(
        images, kernel, sizes.strides, padding, dimension_numbers=numbers, precision=lax.Precision.HIGHEST
    )


def orthogonality(kernel: jax.Array, strides: Strides = 1, *, groups: int = 1, power: Literal[1, 2] = 2) -> jax.Array:
    r"""Returns \(L_{orth}(K) = \|\mathrm{conv}(K, K) - I_0\|_F^2 - \max(0, out - in \cdot S^2)\), zero for isometries.

    With circular padding \(N^2 L_{orth}\) is the squared Frobenius distance of \(T T^T\), or \(T^T T\), from the
    identity, \(T\) being the layer on \(S N \times S N\) images: so it vanishes exactly where the layer is orthogonal,
    for every size. A kernel of a zero-padded layer is an isometry away from the border only.

    Args:
      kernel: `[*window, in, out]`; of a grouped layer `in` is that of one group.
      strides: of the layer.
      groups: `feature_group_count`; each group is a convolution of its own.
      power: 2 as here, or 1 for its root, as Wang et al. add it to the loss; a value that rounding left below zero
        counts as zero.

    Returns:
      A scalar, in float32 at least.

    Raises:
      RoleError: no window, strides of another number, or groups that do not divide the outputs.
      ValueError: `power` is neither 1 nor 2.

    Example:
      >>> import jax.numpy as jnp
      >>> identity = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
      >>> float(orthogonality(identity)), float(orthogonality(2 * identity))
      (0.0, 18.0)
    """
    check_choice("orthogonality: power", power, (1, 2))
    sizes = sizes_of(kernel.shape, strides, groups)

    def of_group(kernel: jax.Array) -> jax.Array:
        found = self_convolution(kernel, sizes.strides)
        center = (slice(None), *sizes.reach, slice(None))
        off = found.at[center].add(-jnp.eye(sizes.outputs, dtype=found.dtype))
        return jnp.sum(off * off) - max(0, sizes.outputs - sizes.inputs * math.prod(sizes.strides))

    parts = kernel.reshape(*kernel.shape[:-1], groups, sizes.outputs)
    total = jnp.sum(jax.vmap(of_group, in_axes=-2)(parts))
    if power == 2:
        return total
    # The root has no derivative at zero.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)
