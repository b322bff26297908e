"""Writes GGUF files of version 3, whole or not at all."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.io import replacing

from ._gguf_tensor import KINDS, GgufTensor

_NUMBERS = {kind.name: number for number, kind in KINDS.items()}
_ARRAYS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
_ALIGNMENT = 32


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor | np.ndarray]) -> None:
    """Writes a GGUF file, in its place only once it is whole.

    Args:
        path: the file.
        metadata: values by key: strings, booleans, integers, floats, lists of strings, NumPy arrays of numbers.
        tensors: by name: tensors of another file, whose blocks are kept as they are, or float32 or float16 arrays.

    Raises:
        ValueError: a value or an array for which the format has no type.

    Example:
        >>> import tempfile, numpy as np
        >>> from subspace_jax.models import read_gguf
        >>> path = Path(tempfile.mkdtemp(), "w.gguf")
        >>> write_gguf(path, {"general.name": "w"}, {"w": np.ones((2, 3), np.float16)})
        >>> read_gguf(path).tensors["w"].dequantize().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    stored = {name: _tensor(name, tensor) for name, tensor in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(metadata))
    head += b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    offset = 0
    for name, tensor in stored.items():
        sizes = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _NUMBERS[tensor.kind], offset)
        offset += -(-tensor.raw.size // alignment) * alignment
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        for part in _padded(head, stored, alignment):
            file.write(part)


def _padded(head: bytes, tensors: Mapping[str, GgufTensor], alignment: int) -> Iterator[Any]:
    yield head
    yield bytes(-len(head) % alignment)
    for tensor in tensors.values():
        yield np.ascontiguousarray(tensor.raw).data
        yield bytes(-tensor.raw.size % alignment)


def _tensor(name: str, value: GgufTensor | np.ndarray) -> GgufTensor:
    if isinstance(value, GgufTensor):
        return value
    kind = {"float32": "F32", "float16": "F16"}.get(value.dtype.name)
    if kind is None or not 1 <= value.ndim <= 4 or not value.size:
        raise ValueError(f"write_gguf: {name!r} is {value.dtype}{list(value.shape)}; expected float32 or float16")
    return GgufTensor(name, value.shape, kind, np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _string(text: str) -> bytes:
    data = text.encode("utf8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """Type and value of an entry; integers are unsigned of four bytes where they fit, as most writers have them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return struct.pack("<II", 4, value)
        return struct.pack("<Iq", 11, value) if value < 1 << 63 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        exact = struct.unpack("<f", struct.pack("<f", value))[0] == value
        return struct.pack("<If", 6, value) if exact else struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.str[1:] in _ARRAYS:
        data = value.astype(value.dtype.newbyteorder("<")).tobytes()
        return struct.pack("<IIQ", 9, _ARRAYS[value.dtype.str[1:]], len(value)) + data
    raise ValueError(f"write_gguf: {key!r} is a {type(value).__name__}, for which the format has no type")
