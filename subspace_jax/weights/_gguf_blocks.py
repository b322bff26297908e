"""The blocks of quantized GGUF tensors, dequantized by JAX: what a kernel stands on while it stays packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Products of a float16 scale, a scale of 6 or 8 bits and a code are exact in float32, so that a compiler that fuses
# them with the sum that follows gives the numbers of one that does not.


class BlockKind(NamedTuple):
    """A kind of block.

    Attributes:
      values: that one block holds.
      size: its bytes.
      scales: places of its float16 numbers.
      dequantize: from `[..., size]` uint8 to `[..., values]` float32.
    """

    values: int
    size: int
    scales: tuple[int, ...]
    dequantize: Callable[[jax.Array], jax.Array]


def _half(blocks: jax.Array, start: int) -> jax.Array:
    """The float16 at a place of every block, `[..., 1]`."""
    return lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16).astype(jnp.float32)[..., None]


def _nibbles(packed: jax.Array) -> jax.Array:
    """Low halves of bytes, then the high ones."""
    return jnp.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _q4_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]).astype(jnp.float32) - 8.0)


def _q4_1(blocks: jax.Array) -> jax.Array:
    return _nibbles(blocks[..., 4:]).astype(jnp.float32) * _half(blocks, 0) + _half(blocks, 2)


def _five_bits(blocks: jax.Array, start: int) -> jax.Array:
    """Codes 0-31: fifth bits in four bytes, then the lower ones."""
    bits = (blocks[..., start : start + 4, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    high = bits.reshape(*blocks.shape[:-1], 32)
    return (_nibbles(blocks[..., start + 4 :]) | (high << 4)).astype(jnp.float32)


def _q5_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * (_five_bits(blocks, 2) - 16.0)


def _q5_1(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * _five_bits(blocks, 4) + _half(blocks, 2)


def _signed(packed: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(packed, jnp.int8).astype(jnp.float32)


def _q8_0(blocks: jax.Array) -> jax.Array:
    return _signed(blocks[..., 2:]) * _half(blocks, 0)


def _six_bit_scales(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eight scales and eight minimums of 6 bits in 12 bytes, `[..., 8, 1]` each."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = jnp.concatenate([first & 63, (third & 0x0F) | ((first >> 6) << 4)], axis=-1)
    minimums = jnp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales.astype(jnp.float32)[..., None], minimums.astype(jnp.float32)[..., None]


def _groups(packed: jax.Array) -> jax.Array:
    """128 bytes as eight groups of 32 codes: of every 32 bytes the low halves, then the high ones."""
    parts = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    halves = jnp.concatenate([parts & 0x0F, parts >> 4], axis=-2)
    return halves.reshape(*packed.shape[:-1], 8, 32)


def _scaled(blocks: jax.Array, codes: jax.Array) -> jax.Array:
    scales, minimums = _six_bit_scales(blocks[..., 4:16])
    left, right = _half(blocks, 0)[..., None] * scales, _half(blocks, 2)[..., None] * minimums
    return (left * codes.astype(jnp.float32) - right).reshape(*blocks.shape[:-1], 256)


def _q4_k(blocks: jax.Array) -> jax.Array:
    return _scaled(blocks, _groups(blocks[..., 16:]))


def _q5_k(blocks: jax.Array) -> jax.Array:
    high = (blocks[..., None, 16:48] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
    return _scaled(blocks, _groups(blocks[..., 48:]) | (high << 4))


def _q6_k(blocks: jax.Array) -> jax.Array:
    front = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*front, 2, 1, 2, 32)
    low = jnp.concatenate([low & 0x0F, low >> 4], axis=-3).reshape(*front, 2, 4, 32)
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
    high = (blocks[..., 128:192].reshape(*front, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).astype(jnp.float32) - 32.0
    values = codes.reshape(*front, 16, 16) * _signed(blocks[..., 192:208])[..., None]
    return (_half(blocks, 208)[..., None] * values).reshape(*front, 256)


BLOCK_KINDS: Mapping[str, BlockKind] = {
    "Q4_0": BlockKind(32, 18, (0,), _q4_0),
    "Q4_1": BlockKind(32, 20, (0, 2), _q4_1),
    "Q5_0": BlockKind(32, 22, (0,), _q5_0),
    "Q5_1": BlockKind(32, 24, (0, 2), _q5_1),
    "Q8_0": BlockKind(32, 34, (0,), _q8_0),
    "Q4_K": BlockKind(256, 144, (0, 2), _q4_k),
    "Q5_K": BlockKind(256, 176, (0, 2), _q5_k),
    "Q6_K": BlockKind(256, 210, (208,), _q6_k),
}


def row_bytes(kind: str, values: int) -> int:
    """Returns the bytes of a row of so many values.

    >>> row_bytes("Q4_K", 512), row_bytes("Q8_0", 64)
    (288, 68)
    """
    found = BLOCK_KINDS[kind]
    return values // found.values * found.size


def dequantize_rows(kind: str, rows: jax.Array, values: int) -> jax.Array:
    """Returns rows of a kind of block as float32 `[..., values]`.

    Args:
      kind: of `BLOCK_KINDS`.
      rows: `[..., bytes]` uint8; bytes beyond those of the row are padding.
      values: that a row holds.
    """
    found = BLOCK_KINDS[kind]
    count = values // found.values
    blocks = rows[..., : count * found.size].reshape(*rows.shape[:-1], count, found.size)
    return found.dequantize(blocks).reshape(*rows.shape[:-1], values)
