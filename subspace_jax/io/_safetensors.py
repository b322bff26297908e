"""Reads and writes safetensors files; every claim of a header is checked against the file before it is used."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from subspace_jax.io._atomic import replacing
from subspace_jax.io._errors import AdapterFileError, listing

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}

NATIVE_DTYPES = frozenset(_DTYPES.values())

# The tensor names of a file are never used as file names, but other programs do just that.
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\\]|^/|^[A-Za-z]:/|(^|/)\.\.?(/|$)|^~")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What a checked header says about one tensor.

    Attributes:
      dtype: its dtype.
      shape: its shape.
      start: position of its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    The header is checked whole before anything else is read; no memory is reserved on its word.

    Args:
      path: the file.

    Returns:
      `(tensors, metadata)`: arrays by name, in the order of the header, and its `__metadata__`.

    Raises:
      AdapterFileError: the file is missing, truncated, not of this format, or its header contradicts it.

    Example:
      >>> import pathlib, tempfile, numpy as np
      >>> path = pathlib.Path(tempfile.mkdtemp(), "tensors.safetensors")
      >>> write_safetensors(path, {"a": np.ones((2, 3), np.float32)}, {"note": "hello"})
      >>> tensors, metadata = read_safetensors(path)
      >>> tensors["a"].shape, metadata
      ((2, 3), {'note': 'hello'})
    """
    with open_checked(path) as file:
        entries, metadata = read_header(file, path)
        tensors = {}
        for name, entry in entries.items():
            file.seek(entry.start)
            count = math.prod(entry.shape) * entry.dtype.itemsize
            data = np.fromfile(file, np.uint8, count)
            if data.size != count:
                raise AdapterFileError(f"{path}: the file was cut while it was read, at tensor {name!r}.")
            tensors[name] = data.view(entry.dtype).reshape(entry.shape)
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file atomically: a failure leaves what was there before.

    Args:
      path: the file; its folder must exist.
      tensors: arrays by name.
      metadata: texts by name.

    Raises:
      AdapterFileError: a name is unsafe, a dtype is not known to the format, or the folder does not exist.

    Example:
      >>> import pathlib, tempfile, numpy as np
      >>> path = pathlib.Path(tempfile.mkdtemp(), "tensors.safetensors")
      >>> write_safetensors(path, {"a": np.arange(3)}, {"note": "hello"})
      >>> read_safetensors(path)[0]["a"].tolist()
      [0, 1, 2]
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    wrong = [f"{name!r}: {why}" for name in tensors if (why := _refuse_name(name))]
    wrong += [
        f"{n!r}: dtype {t.dtype} is not known to the format" for n, t in tensors.items() if t.dtype not in NATIVE_DTYPES
    ]
    if wrong:
        raise AdapterFileError(f"{path}: nothing was written, because of tensors{listing(wrong)}")
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise AdapterFileError(f"{path}: the folder does not exist; create it first.")
    # The library writes memory as it lies, so that anything but C order would come back scrambled.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be written: {error}") from error


def open_checked(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading; raises AdapterFileError where that fails."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise AdapterFileError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise AdapterFileError(f"{os.fspath(path)!r} is no file name: {error}.") from error


def read_header(file: BinaryIO, path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Returns the checked entries of a file's tensors and its metadata.

    Args:
      file: the open file.
      path: its name, for errors.

    Raises:
      AdapterFileError: the header does not describe exactly the bytes of this file.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise AdapterFileError(f"{path}: has {size} bytes, and a safetensors file at least 8. It is truncated.")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise AdapterFileError(
            f"{path}: claims a header of {length} bytes, but the file has {size} and headers at most {MAX_HEADER}. It "
            "is truncated, or no safetensors file."
        )
    header = _parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path}: __metadata__ is not an object of strings.")
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    _check_cover(entries, size - 8 - length, path)
    start = 8 + length
    return {n: dataclasses.replace(e, start=start + e.start) for n, e in entries.items()}, metadata


def _parse(text: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterFileError(f"{path}: the header has {twice!r} twice.")
        return out

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: the header is no JSON: {str(error)[:100]}.") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path}: the header is a JSON {type(header).__name__}, expected an object.")
    return header


def _entry(name: str, value: Any, path: str | os.PathLike[str]) -> TensorEntry:
    """The entry of one tensor, its `start` counted from the header's end."""
    where = f"{path}: tensor {name[:100]!r}"
    if why := _refuse_name(name):
        raise AdapterFileError(f"{where}: {why}.")
    match value:
        case {"dtype": str() as dtype, "shape": list() as shape, "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            raise AdapterFileError(f"{where}: {str(value)[:80]!r} does not tell dtype, shape and data_offsets.")
    if dtype not in _DTYPES:
        raise AdapterFileError(f"{where}: dtype {dtype[:20]!r} is not one of {', '.join(_DTYPES)}.")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, start, end)) or len(shape) > 32:
        raise AdapterFileError(
            f"{where}: shape {str(shape)[:80]} and offsets {str([start, end])[:80]} must be integers from 0 to "
            "2**62, and axes at most 32."
        )
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - start != expected:
        raise AdapterFileError(
            f"{where}: {dtype} of shape {str(shape)[:80]} takes {expected} bytes, but the offsets [{start}, "
            f"{end}] give {end - start}."
        )
    return TensorEntry(_DTYPES[dtype], tuple(shape), start)


def _check_cover(entries: Mapping[str, TensorEntry], size: int, path: str | os.PathLike[str]) -> None:
    """Refuses tensors that overlap, leave holes, or do not end with the file."""
    position = 0
    lengths = {n: math.prod(e.shape) * e.dtype.itemsize for n, e in entries.items()}
    for name in sorted(entries, key=lambda n: (entries[n].start, lengths[n])):
        if entries[name].start != position:
            what = "overlaps the one before it" if entries[name].start < position else "leaves a hole before it"
            raise AdapterFileError(
                f"{path}: tensor {name!r} begins at byte {entries[name].start} of the data, expected "
                f"{position}: it {what}."
            )
        position += lengths[name]
        if position > size:
            raise AdapterFileError(
                f"{path}: tensor {name!r} ends at byte {position} of the data, but the file has {size}: it "
                "is truncated."
            )
    if position != size:
        raise AdapterFileError(f"{path}: {size - position} bytes at the end belong to no tensor.")


def _refuse_name(name: str) -> str | None:
    """Why a tensor's name is unsafe; None for a sound one."""
    if not name or len(name) > 4096:
        return "the name is empty or longer than 4096 characters"
    if name == "__metadata__":
        return "the name is reserved by the format"
    if _UNSAFE_NAME.search(name):
        return "the name looks like a path out of a folder, or holds control characters"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "the name is not valid Unicode"
    return None
