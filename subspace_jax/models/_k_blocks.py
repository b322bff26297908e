"""The blocks of GGUF tensors in which 256 values share scales of 6 or 8 bits."""

from __future__ import annotations

import numpy as np

# Each takes `[bytes]` uint8 and returns float32 `[blocks, values of a block]`.


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a place of every block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def dequantize_q4_0(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q4_0 blocks: `scale * (code - 8)`; 18 bytes hold 32 values."""
    blocks = raw.reshape(-1, 18)
    codes = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1)
    return _half(blocks, 0) * (codes.astype(np.float32) - 8.0)


def _five_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Codes 0-31: fifth bits in four bytes, then the lower ones in halves of sixteen bytes."""
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    low = blocks[:, start + 4 :]
    return np.concatenate([low & 0x0F, low >> 4], axis=1) | (high << 4)


def dequantize_q5_0(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q5_0 blocks: `scale * (code - 16)`; 22 bytes hold 32 values."""
    blocks = raw.reshape(-1, 22)
    return _half(blocks, 0) * (_five_bits(blocks, 2).astype(np.float32) - 16.0)


def dequantize_q5_1(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q5_1 blocks: `scale * code + minimum`; 24 bytes hold 32 values."""
    blocks = raw.reshape(-1, 24)
    return _half(blocks, 0) * _five_bits(blocks, 4).astype(np.float32) + _half(blocks, 2)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minimums of 6 bits in 12 bytes, `[blocks, 8]` each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 0x0F) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _scaled(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`scale s_j code - minimum m_j` for the eight groups of 32 codes, `[blocks, 8, 32]`."""
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    left = (_half(blocks, 0) * scales)[..., None]
    right = (_half(blocks, 2) * minimums)[..., None]
    return (left * codes - right).reshape(len(blocks), 256)


def _halves(packed: np.ndarray) -> np.ndarray:
    """128 bytes as eight groups of 32 codes: of every 32 bytes the low halves, then the high ones."""
    parts = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([parts & 0x0F, parts >> 4], axis=2).reshape(-1, 8, 32)


def dequantize_q4_k(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q4_K blocks: `scale s_j code - minimum m_j`; 144 bytes hold 256 values."""
    blocks = raw.reshape(-1, 144)
    return _scaled(blocks, _halves(blocks[:, 16:]).astype(np.float32))


def dequantize_q5_k(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q5_K blocks, Q4_K's with a fifth bit; 176 bytes hold 256 values."""
    blocks = raw.reshape(-1, 176)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    high = (blocks[:, None, 16:48] >> shifts) & 1
    return _scaled(blocks, (_halves(blocks[:, 48:]) | (high << 4)).astype(np.float32))


def dequantize_q6_k(raw: np.ndarray) -> np.ndarray:
    """Returns the values of Q6_K blocks: `scale s_j (code - 32)` with `s_j` of 8 bits; 210 bytes hold 256 values."""
    blocks = raw.reshape(-1, 210)
    low = blocks[:, :128].reshape(-1, 2, 1, 2, 32)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).astype(np.float32) - 32.0
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    values = codes.reshape(-1, 16, 16) * scales[..., None]
    return (_half(blocks, 208)[..., None] * values).reshape(len(blocks), 256)


def dequantize_bf16(raw: np.ndarray) -> np.ndarray:
    """Returns bfloat16 values: the upper halves of float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
