"""Reads GGUF files with numpy: metadata and quantized tensors, every size checked against the file.

Layout of the file: magic `GGUF`, version, tensor count, metadata count; metadata entries (key, type, value);
tensor entries (name, reversed sizes, type, offset); then, aligned, the data.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ._gguf_tensor import KINDS, GgufTensor

_MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_AXES = 4
_HEAD_BYTES = 24
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF file.

    Attributes:
        metadata: value by key; arrays of numbers are numpy arrays, arrays of strings lists.
        tensors: tensor by name.
        mapped: the file in memory, where it was mapped.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    mapped: mmap.mmap | None = None

    def release(self) -> None:
        """Gives back the memory of what was read so far; what is read again comes from the file again."""
        if self.mapped is not None and hasattr(self.mapped, "madvise"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def read_gguf(path: str | Path) -> GgufFile:
    """Reads a GGUF file; tensors stay in the file until `dequantize`.

    Args:
        path: the file.

    Returns:
        Metadata and tensors.

    Raises:
        ValueError: the file is truncated, damaged, no GGUF of version 2 or 3, or has a tensor of another type
          than those of `GgufTensor`; the message names the file and the entry.
    """
    path = Path(path)
    if path.stat().st_size < _HEAD_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; a GGUF file has at least {_HEAD_BYTES}")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return dataclasses.replace(parse_gguf(np.frombuffer(mapped, np.uint8), str(path)), mapped=mapped)


def parse_gguf(data: np.ndarray, source: str) -> GgufFile:
    """Parses the bytes of a GGUF file; see `read_gguf`.

    Args:
        data: `[bytes]` uint8.
        source: what error messages call the file.

    Returns:
        Metadata and tensors, the latter as views of `data`.

    Raises:
        ValueError: as `read_gguf`.
    """
    cursor = _Cursor(data, source)
    if cursor.take(4, "the magic").tobytes() != _MAGIC:
        raise ValueError(f"{source}: does not begin with GGUF; this is no GGUF file")
    version = cursor.scalar(4)
    if version not in (2, 3):
        raise ValueError(f"{source}: GGUF version {version}; expected 2 or 3, little-endian")
    tensor_count, entry_count = cursor.scalar(10), cursor.scalar(10)
    cursor.expect(tensor_count * _LEAST_TENSOR + entry_count * _LEAST_ENTRY, "as many entries as the header says")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"{source}: metadata key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.scalar(4), key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ValueError(f"{source}: general.alignment is {alignment!r}; expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(metadata, _tensors(data, infos, start, alignment, source))


class _Cursor:
    """A place in the bytes; every step is checked before it is taken."""

    def __init__(self, data: np.ndarray, source: str):
        self.data, self.source, self.at = data, source, 0

    def expect(self, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if size > left:
            raise ValueError(f"{self.source}: {what} needs {size} bytes where {left} are left: truncated or damaged")

    def take(self, size: int, what: str) -> np.ndarray:
        self.expect(size, what)
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, kind: int) -> Any:
        dtype = np.dtype(_SCALARS[kind])
        value = self.take(dtype.itemsize, "a number").view(dtype)[0].item()
        return bool(value) if kind == _BOOL else value

    def string(self, what: str) -> str:
        size = self.scalar(10)
        try:
            return self.take(size, what).tobytes().decode("utf8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source}: {what} is not UTF-8 text: damaged") from error

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings: vocabularies have tens of thousands, so the inner loop avoids numpy."""
        self.expect(8 * count, what)
        view, at, texts = self.data.data, self.at, []
        for _ in range(count):
            self.at = at
            self.expect(8, what)
            (size,) = struct.unpack_from("<Q", view, at)
            self.at = at + 8
            self.expect(size, what)
            at += 8 + size
            try:
                texts.append(str(view[at - size : at], "utf8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.source}: a string of {what} is not UTF-8 text: damaged") from error
        self.at = at
        return texts

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"metadata {key!r}")
        if kind != _ARRAY:
            self.known(kind, key)
            return self.scalar(kind)
        element, count = self.scalar(4), self.scalar(10)
        if element == _STRING:
            return self.strings(count, f"metadata {key!r}")
        self.known(element, key)
        dtype = np.dtype(_SCALARS[element])
        values = self.take(count * dtype.itemsize, f"metadata {key!r}").view(dtype)
        return values.astype(bool) if element == _BOOL else values

    def known(self, kind: int, key: str) -> None:
        if kind not in _SCALARS:
            raise ValueError(f"{self.source}: metadata {key!r} has value type {kind}; it is unknown or nested")


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name")
    axes = cursor.scalar(4)
    if not 1 <= axes <= _MAX_AXES:
        raise ValueError(f"{cursor.source}: tensor {name!r} has {axes} axes; expected 1 to {_MAX_AXES}")
    sizes = tuple(cursor.scalar(10) for _ in range(axes))
    return name, sizes[::-1], cursor.scalar(4), cursor.scalar(10)


def _tensors(
    data: np.ndarray,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    start: int,
    alignment: int,
    source: str,
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    end_of_last = 0
    for name, shape, kind_number, offset in sorted(infos, key=lambda info: info[3]):
        kind = KINDS.get(kind_number)
        if kind is None:
            known = ", ".join(k.name for k in KINDS.values())
            raise ValueError(f"{source}: tensor {name!r} has GGML type {kind_number}; only {known} are read")
        # Python integers: a hostile product of sizes must not wrap around.
        if 0 in shape or shape[-1] % kind.block:
            raise ValueError(
                f"{source}: tensor {name!r} of type {kind.name} has shape {shape}; expected positive "
                f"sizes and a last axis in blocks of {kind.block}"
            )
        size = math.prod(shape) // kind.block * kind.block_bytes
        if offset % alignment or offset < end_of_last or start + offset + size > len(data):
            raise ValueError(
                f"{source}: tensor {name!r} lies at offset {offset} with {size} bytes; expected a multiple "
                f"of {alignment}, no overlap and an end within {len(data) - start} bytes of data: truncated "
                "or damaged"
            )
        if name in tensors:
            raise ValueError(f"{source}: two tensors are called {name!r}")
        end_of_last = offset + size
        tensors[name] = GgufTensor(name, shape, kind.name, data[start + offset : start + offset + size])
    return tensors
