"""Host memory that a CPU backend can use as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64
_AT_A_TIME = 1 << 24  # bytes that are copied at a time


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialized array whose bytes begin where JAX on a CPU needs no copy of them.

    >>> aligned_empty((3, 5), np.float32).ctypes.data % 64
    0
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def hand_over(array: np.ndarray, dtype: Any = None, read: Callable[[], None] = lambda: None) -> jax.Array:
    """Returns an array on the default device; the caller gives up its own, whose memory may be shared.

    Args:
        array: of the host, not written to any more.
        dtype: to cast to; its own if None.
        read: called after every part that was copied.
    """
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    shared = array.flags.c_contiguous and array.flags.writeable and not array.ctypes.data % _ALIGNMENT
    if array.dtype != dtype or not shared:  # what cannot be written to is a file in memory, which may change
        copy = aligned_empty(array.shape, dtype)
        step = max(1, _AT_A_TIME * len(array) // array.nbytes) if array.nbytes else 1
        for start in range(0, len(array), step) if array.ndim else ():
            copy[start : start + step] = array[start : start + step]
            read()
        if not array.ndim:
            copy[...] = array
        array = copy
    return jax.device_put(array, may_alias=True)
