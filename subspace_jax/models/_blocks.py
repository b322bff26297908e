"""The quantized blocks of GGUF tensors."""

from __future__ import annotations

import numpy as np


def unpack_q4_1(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits Q4_1 blocks: value = `scale * code + minimum`.

    Args:
        raw: `[20 blocks]` uint8; a block is a float16 scale, a float16 minimum and 16 bytes whose low
            halves are elements 0-15 and whose high halves are elements 16-31.

    Returns:
        `(scales, minimums, codes)`: float32 `[blocks]`, float32 `[blocks]`, uint8 0-15 `[blocks, 32]`.

    Example:
        >>> import numpy as np
        >>> block = np.concatenate([np.array([0.5, 1.0], "<f2").view(np.uint8), np.full(16, 0x31, np.uint8)])
        >>> scale, minimum, codes = unpack_q4_1(block)
        >>> (codes * scale[:, None] + minimum[:, None])[0, [0, 16]].tolist()
        [1.5, 2.5]
    """
    blocks = raw.reshape(-1, 20)
    halves = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    packed = blocks[:, 4:]
    return halves[:, 0], halves[:, 1], np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def unpack_q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits Q8_0 blocks: value = `scale * code`.

    Args:
        raw: `[34 blocks]` uint8; a block is a float16 scale and 32 int8.

    Returns:
        `(scales, codes)`: float32 `[blocks]`, int8 `[blocks, 32]`.

    Example:
        >>> import numpy as np
        >>> block = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.full(32, 254, np.uint8)])
        >>> scale, codes = unpack_q8_0(block)
        >>> float(scale[0] * codes[0, 0])
        -1.0
    """
    blocks = raw.reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)[:, 0]
    return scales, np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
