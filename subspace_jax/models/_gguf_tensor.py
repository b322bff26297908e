"""A tensor of a GGUF file: its kinds of blocks, and what they mean as numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import _k_blocks as blocks
from ._aligned import aligned_empty
from ._blocks import unpack_q4_1, unpack_q8_0

_BLOCK, _LARGE_BLOCK = 32, 256
_AT_A_TIME = 1 << 16  # values that are dequantized at a time: few enough to stay in a processor's cache


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of block: its name, the values that one holds, and its bytes."""

    name: str
    block: int
    block_bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", _BLOCK, 18),
    3: Kind("Q4_1", _BLOCK, 20),
    6: Kind("Q5_0", _BLOCK, 22),
    7: Kind("Q5_1", _BLOCK, 24),
    8: Kind("Q8_0", _BLOCK, 34),
    12: Kind("Q4_K", _LARGE_BLOCK, 144),
    13: Kind("Q5_K", _LARGE_BLOCK, 176),
    14: Kind("Q6_K", _LARGE_BLOCK, 210),
    30: Kind("BF16", 1, 2),
}
BY_NAME = {kind.name: kind for kind in KINDS.values()}
_DEQUANTIZE = {
    "Q4_0": blocks.dequantize_q4_0,
    "Q5_0": blocks.dequantize_q5_0,
    "Q5_1": blocks.dequantize_q5_1,
    "Q4_K": blocks.dequantize_q4_k,
    "Q5_K": blocks.dequantize_q5_k,
    "Q6_K": blocks.dequantize_q6_k,
    "BF16": blocks.dequantize_bf16,
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file, still in its stored form.

    Attributes:
        name: in the file.
        shape: in numpy's order, the contiguous axis last.
        kind: `"F32"`, `"F16"`, `"BF16"`, `"Q4_0"`, `"Q4_1"`, `"Q5_0"`, `"Q5_1"`, `"Q8_0"`, `"Q4_K"`, `"Q5_K"` or
            `"Q6_K"`.
        raw: `[bytes]` uint8, a read-only view of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: np.ndarray

    def dequantize(self) -> np.ndarray:
        """Returns the tensor as a new float32 array of `shape`."""
        kind = BY_NAME[self.kind]
        found = aligned_empty(self.shape, np.float32)
        flat, step = found.reshape(-1), _AT_A_TIME // kind.block * kind.block
        for start in range(0, flat.size, step):
            stop = min(start + step, flat.size)
            raw = self.raw[start // kind.block * kind.block_bytes : stop // kind.block * kind.block_bytes]
            flat[start:stop] = _dequantize(self.kind, raw).reshape(-1)
        return found

    def rows(self) -> np.ndarray:
        """Returns the bytes of every row, `[rows, bytes]` uint8, a view of the file."""
        return self.raw.reshape(int(np.prod(self.shape[:-1])), -1)


def _dequantize(kind: str, raw: np.ndarray) -> np.ndarray:
    """The float32 values of some blocks."""
    if kind in _DEQUANTIZE:
        return _DEQUANTIZE[kind](raw)
    if kind == "Q4_1":
        scales, minimums, codes = unpack_q4_1(raw)
        return codes * scales[:, None] + minimums[:, None]
    if kind == "Q8_0":
        scales, codes = unpack_q8_0(raw)
        return codes * scales[:, None]
    return raw.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
