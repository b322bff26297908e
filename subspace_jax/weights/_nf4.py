"""A frozen array in 4-bit NormalFloat blocks.

The data type is that of QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers, Pagnoni, Holtzman, Zettlemoyer,
2023).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Role, Weight, register_weight, static
from subspace_jax.linalg import whole_matrices

BLOCK = 64
LEVELS = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)

Order = Literal["out_in", "in_out"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Weight):
    """A frozen array of 4-bit codes with one float32 scale per block of 64 entries.

    Attributes:
      codes: `[*stack, 32 * blocks]` uint8, two codes a byte, the first in the low half.
      absmax: `[*stack, blocks]` float32, the largest magnitude of each block.
      in_sizes: sizes of the role's input axes.
      out_sizes: sizes of the role's output axes.
      order: whether entries follow each other as in the (out, in) matrix, as other tools store it, or as in (in,
        out).
    """

    codes: jax.Array
    absmax: jax.Array
    in_sizes: tuple[int, ...] = static()
    out_sizes: tuple[int, ...] = static()
    order: Order = static(default="out_in")

    axes: ClassVar[Mapping[str, str]] = {"codes": "stack code", "absmax": "stack block"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that was quantized."""
        return self.role.joined_shape(self.codes.shape[:-1], self.in_sizes, self.out_sizes)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the dequantized array."""
        one = self.with_frozen_stopped()
        low, high = one.codes & 15, one.codes >> 4
        codes = jnp.stack([low, high], axis=-1).reshape(*one.absmax.shape, BLOCK)
        values = jnp.asarray(LEVELS)[codes] * one.absmax[..., None]
        inputs, outputs = math.prod(one.in_sizes), math.prod(one.out_sizes)
        flat = values.reshape(*one.absmax.shape[:-1], -1)[..., : inputs * outputs]
        if one.order == "out_in":
            matrix = jnp.swapaxes(flat.reshape(*flat.shape[:-1], outputs, inputs), -1, -2)
        else:
            matrix = flat.reshape(*flat.shape[:-1], inputs, outputs)
        return one.role.unmatrix(matrix, one.shape).astype(self.dtype if dtype is None else dtype)

    def reshape(self, shape: tuple[int, ...]) -> NF4 | None:
        """Returns the weight of the reshaped array."""
        moved = super().reshape(shape)
        if moved is None:
            return None
        return dataclasses.replace(moved, in_sizes=moved.role.in_shape(shape), out_sizes=moved.role.out_shape(shape))


def quantize_nf4(array: jax.Array, role: Role | None = None, order: Order = "out_in") -> NF4:
    """Quantizes an array to the nearest of 16 levels, in blocks of 64 consecutive entries.

    Args:
      array: floating array of shape `[*stack, in, out]` up to the role's axes.
      role: its role; `(in, out)` if None.
      order: in which matrix entries are consecutive.

    Returns:
      The quantized weight; `materialize` gives the rounded array.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.linspace(-1.0, 1.0, 128).reshape(16, 8)
      >>> bool(jnp.abs(quantize_nf4(w).materialize() - w).max() < 0.16)
      True
    """
    role = Role.dense() if role is None else role
    # Blocks run across rows, so they cannot follow a split of the matrix.
    matrix = whole_matrices(role.matrix(array)).astype(jnp.float32)
    entries = jnp.swapaxes(matrix, -1, -2) if order == "out_in" else matrix
    flat = entries.reshape(*entries.shape[:-2], -1)
    padding = -flat.shape[-1] % BLOCK
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
    blocks = flat.reshape(*flat.shape[:-1], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    absmax = jnp.where(absmax == 0, 1.0, absmax)
    # Levels ascend, so the nearest one is told by the midpoints that lie below.
    midpoints = jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2)
    codes = jnp.searchsorted(midpoints, blocks / absmax[..., None]).astype(jnp.uint8)
    pairs = codes.reshape(*flat.shape[:-1], -1, 2)
    return NF4(
        codes=pairs[..., 0] | (pairs[..., 1] << 4),
        absmax=absmax,
        in_sizes=role.in_shape(array.shape),
        out_sizes=role.out_shape(array.shape),
        order=order,
        role=role,
        dtype=array.dtype,
        trainable=(),
        method="nf4",
    )
