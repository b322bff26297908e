"""A frozen array in 4-bit NormalFloat blocks.

The data type is that of QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers, Pagnoni, Holtzman, Zettlemoyer,
2023).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Role, Weight, register_weight, static
from subspace_jax.linalg import whole_matrices

from ._stored import Stored

BLOCK = 64
SCALE_BLOCK = 256  # scales that share one of their own, where they are quantized too
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
class NF4(Stored, Weight):
    """A frozen array of 4-bit codes with one scale per block of 64 entries.

    Attributes:
      codes: `[*stack, 32 * blocks]` uint8, two codes a byte, the first in the low half.
      absmax: `[*stack, blocks]`, the largest magnitude of each block: float32, or its difference from the mean in
        float8 where it is quantized as well.
      absmax_scale: `[*stack, blocks / 256]` float32, what every 256 of those differences are multiplied by, or None.
      absmax_mean: `[*stack]` float32, their mean, or None.
      in_sizes: sizes of the role's input axes.
      out_sizes: sizes of the role's output axes.
      order: whether entries follow each other as in the (out, in) matrix, as other tools store it, or as in (in,
        out).

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
    """

    codes: jax.Array
    absmax: jax.Array
    absmax_scale: jax.Array | None = None
    absmax_mean: jax.Array | None = None
    in_sizes: tuple[int, ...] = static()
    out_sizes: tuple[int, ...] = static()
    order: Order = static(default="out_in")

    axes: ClassVar[Mapping[str, str]] = {
        "codes": "stack code",
        "absmax": "stack block",
        "absmax_scale": "stack group",
        "absmax_mean": "stack",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that was quantized."""
        return self.role.joined_shape(self.codes.shape[:-1], self.in_sizes, self.out_sizes)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the dequantized array."""
        return _dequantize(self, self.dtype if dtype is None else dtype)

    def _scales(self) -> jax.Array:
        """The float32 scale of every block."""
        if self.absmax_scale is None or self.absmax_mean is None:
            return self.absmax
        return _read_scales(self.absmax, self.absmax_scale, self.absmax_mean)

    def reshape(self, shape: tuple[int, ...]) -> NF4 | None:
        """Returns the weight of the reshaped array."""
        moved = super().reshape(shape)
        if moved is None:
            return None
        return dataclasses.replace(moved, in_sizes=moved.role.in_shape(shape), out_sizes=moved.role.out_shape(shape))


def quantize_nf4(array: jax.Array, role: Role | None = None, order: Order = "out_in", *, double: bool = False) -> NF4:
    r"""Quantizes an array to the nearest of 16 levels, in blocks of 64 consecutive entries.

    A block holds \(c\,q_i\) with \(c = \max |w_i|\) and levels \(q_i \in [-1, 1]\). With `double` the scales are
    stored as \(c = \bar c + d\,e\), with \(e\) in float8 (four bits of exponent) and one \(d\) for every 256 blocks,
    which takes a value from 4.5 to 4.127 bits.

    Args:
      array: floating array of shape `[*stack, in, out]` up to the role's axes.
      role: its role; `(in, out)` if None.
      order: in which matrix entries are consecutive.
      double: quantize the scales as well.

    Returns:
      The quantized weight; `materialize` gives the rounded array.

    Raises:
      RoleError: the role does not read the array as a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.linspace(-1.0, 1.0, 128).reshape(16, 8)
      >>> bool(jnp.abs(quantize_nf4(w).materialize() - w).max() < 0.16)
      True

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
    """
    return _quantize(array, Role.dense() if role is None else role, order, double)


# Outside of a trace each of the two is one program, inside a part of the one that is traced.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _quantize(array: jax.Array, role: Role, order: Order, double: bool) -> NF4:
    # Blocks run across rows, so they cannot follow a split of the matrix.
    matrix = whole_matrices(role.matrix(array)).astype(jnp.float32)
    entries = jnp.swapaxes(matrix, -1, -2) if order == "out_in" else matrix
    flat = entries.reshape(*entries.shape[:-2], -1)
    padding = -flat.shape[-1] % BLOCK
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
    blocks = flat.reshape(*flat.shape[:-1], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    absmax = jnp.where(absmax == 0, 1.0, absmax)
    scales: dict[str, Any] = {"absmax": absmax}
    if double:
        scales = _quantize_scales(absmax)
        # Codes are those of the scales that will be multiplied by; a scale never falls to zero.
        read = _read_scales(**scales)
        absmax = jnp.where(read > 0, read, jnp.finfo(jnp.float32).tiny)
    # Levels ascend, so the nearest one is told by the midpoints that lie below.
    midpoints = jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2)
    codes = jnp.searchsorted(midpoints, blocks / absmax[..., None]).astype(jnp.uint8)
    pairs = codes.reshape(*flat.shape[:-1], -1, 2)
    return NF4(
        codes=pairs[..., 0] | (pairs[..., 1] << 4),
        **scales,
        in_sizes=role.in_shape(array.shape),
        out_sizes=role.out_shape(array.shape),
        order=order,
        role=role,
        dtype=array.dtype,
        trainable=(),
        method="nf4",
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(weight: NF4, dtype: Any) -> jax.Array:
    one = weight.with_frozen_stopped()
    low, high = one.codes & 15, one.codes >> 4
    codes = jnp.stack([low, high], axis=-1).reshape(*one.absmax.shape, BLOCK)
    values = jnp.asarray(LEVELS)[codes] * one._scales()[..., None]
    inputs, outputs = math.prod(one.in_sizes), math.prod(one.out_sizes)
    flat = values.reshape(*one.absmax.shape[:-1], -1)[..., : inputs * outputs]
    if one.order == "out_in":
        matrix = jnp.swapaxes(flat.reshape(*flat.shape[:-1], outputs, inputs), -1, -2)
    else:
        matrix = flat.reshape(*flat.shape[:-1], inputs, outputs)
    return one.role.unmatrix(matrix, one.shape).astype(dtype)


def _quantize_scales(absmax: jax.Array) -> dict[str, jax.Array]:
    """Scales as differences from their mean in float8, with a scale of their own for every 256."""
    mean = jnp.mean(absmax, axis=-1)
    difference = absmax - mean[..., None]
    padding = -difference.shape[-1] % SCALE_BLOCK
    padded = jnp.pad(difference, [(0, 0)] * (difference.ndim - 1) + [(0, padding)])
    groups = padded.reshape(*difference.shape[:-1], -1, SCALE_BLOCK)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    scale = jnp.where(largest == 0, 1.0, largest / float(jnp.finfo(jnp.float8_e4m3fn).max))
    codes = (groups / scale[..., None]).astype(jnp.float8_e4m3fn).reshape(*padded.shape)
    return {"absmax": codes[..., : difference.shape[-1]], "absmax_scale": scale, "absmax_mean": mean}


def _read_scales(absmax: jax.Array, absmax_scale: jax.Array, absmax_mean: jax.Array) -> jax.Array:
    """The float32 scales that differences in float8 mean."""
    groups = jnp.repeat(absmax_scale, SCALE_BLOCK, axis=-1)[..., : absmax.shape[-1]]
    return absmax.astype(jnp.float32) * groups + absmax_mean[..., None]
