"""Reads the weights of an ONNX file: a bounds-checked walk over its protobuf fields, nothing executed.

Only what a weight reader needs is understood: the graph's initializers and, because exporters give some of
these anonymous names, which node uses which. Field numbers are those of the public ONNX schema.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_LOCATION = 1, 2, 8, 9, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}
_MAX_AXES = 16
_MAX_ENTRIES = 1 << 20


@dataclasses.dataclass(frozen=True)
class OnnxNode:
    """One operation of a graph.

    Attributes:
        name: of the node.
        operator: for example `"MatMul"`.
        inputs: names of its inputs, initializers among them.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """Weights and nodes of an ONNX file.

    Attributes:
        initializers: arrays by name, read-only views of the file.
        nodes: operations in file order.
    """

    initializers: dict[str, np.ndarray]
    nodes: tuple[OnnxNode, ...]


def read_onnx(path: str | Path) -> OnnxGraph:
    """Reads the initializers and the nodes of an ONNX file.

    Args:
        path: the file.

    Returns:
        The graph; its arrays map the file and are read-only.

    Raises:
        ValueError: the file is truncated, is not an ONNX model, or keeps weights in a form that is not read
          (external files, packed typed fields); the message names the file and the tensor.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected an ONNX model")
    return parse_onnx(np.memmap(path, np.uint8, "r"), str(path))


def parse_onnx(data: np.ndarray, source: str) -> OnnxGraph:
    """Parses the bytes of an ONNX file; see `read_onnx`.

    Args:
        data: `[bytes]` uint8.
        source: what error messages call the file.

    Returns:
        The graph; its arrays are views of `data`.

    Raises:
        ValueError: as `read_onnx`.
    """
    initializers: dict[str, np.ndarray] = {}
    nodes = []
    graphs = [value for field, value in _fields(data, source) if field == _MODEL_GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"{source}: {len(graphs)} graphs; expected one: this is not an ONNX model")
    for field, value in _fields(_message(graphs[0], source), source):
        if len(nodes) + len(initializers) >= _MAX_ENTRIES:
            raise ValueError(f"{source}: more than {_MAX_ENTRIES} nodes and tensors: no ONNX model")
        if field == _GRAPH_NODE:
            nodes.append(_node(_message(value, source), source))
        elif field == _GRAPH_INITIALIZER:
            name, array = _tensor(_message(value, source), source)
            if name in initializers:
                raise ValueError(f"{source}: two initializers are called {name!r}")
            initializers[name] = array
    return OnnxGraph(initializers, tuple(nodes))


def _varint(data: np.ndarray, at: int, source: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"{source}: the file ends inside a number: truncated, or no ONNX model")
        byte = int(data[at])
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError(f"{source}: a number of more than 10 bytes: damaged, or no ONNX model")


def _fields(data: np.ndarray, source: str) -> Iterator[tuple[int, int | np.ndarray]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, source)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at, source)
            yield field, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, source)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"{source}: wire type {wire} of field {field}: damaged, or no ONNX model")
        if field == 0 or size > len(data) - at:
            raise ValueError(
                f"{source}: field {field} wants {size} bytes where {len(data) - at} are left: truncated, or "
                "no ONNX model"
            )
        yield field, data[at : at + size]
        at += size


def _message(value: int | np.ndarray, source: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{source}: a number stands where a message or text belongs: no ONNX model")
    return value


def _number(value: int | np.ndarray, source: str) -> int:
    if isinstance(value, np.ndarray):
        raise ValueError(f"{source}: bytes stand where a number belongs: no ONNX model")
    return value


def _text(value: int | np.ndarray, source: str) -> str:
    try:
        return _message(value, source).tobytes().decode("utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: a name is not UTF-8 text: damaged, or not an ONNX model") from error


def _node(data: np.ndarray, source: str) -> OnnxNode:
    name, operator, inputs = "", "", []
    for field, value in _fields(data, source):
        if field == _NODE_INPUT:
            inputs.append(_text(value, source))
        elif field == _NODE_NAME:
            name = _text(value, source)
        elif field == _NODE_OPERATOR:
            operator = _text(value, source)
    return OnnxNode(name, operator, tuple(inputs))


def _dims(value: int | np.ndarray, source: str) -> list[int]:
    if not isinstance(value, np.ndarray):
        return [value]
    dims, at = [], 0
    while at < len(value):
        if len(dims) > _MAX_AXES:
            break
        dim, at = _varint(value, at, source)
        dims.append(dim)
    return dims


def _tensor(data: np.ndarray, source: str) -> tuple[str, np.ndarray]:
    dims: list[int] = []
    kind, name, raw, location = 0, "", None, 0
    for field, value in _fields(data, source):
        if field == _TENSOR_DIMS:
            dims += _dims(value, source)
            if len(dims) > _MAX_AXES:
                raise ValueError(f"{source}: a tensor of more than {_MAX_AXES} axes")
        elif field == _TENSOR_TYPE:
            kind = _number(value, source)
        elif field == _TENSOR_NAME:
            name = _text(value, source)
        elif field == _TENSOR_RAW:
            raw = _message(value, source)
        elif field == _TENSOR_LOCATION:
            location = _number(value, source)
    return name, _array(name, dims, kind, raw, location, source)


def _array(name: str, dims: list[int], kind: int, raw: np.ndarray | None, location: int, source: str) -> np.ndarray:
    if location != 0 or raw is None:
        raise ValueError(f"{source}: tensor {name!r} has no raw data inside the file; only such are read")
    if kind not in _DTYPES:
        raise ValueError(f"{source}: tensor {name!r} has ONNX data type {kind}; expected one of {sorted(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    # Python integers: a hostile product of sizes must not wrap around.
    expected = math.prod(dims) * dtype.itemsize
    if expected != len(raw):
        raise ValueError(
            f"{source}: tensor {name!r} of shape {tuple(dims)} and {dtype} needs {expected} bytes, holds {len(raw)}"
        )
    if max(dims, default=0) > np.iinfo(np.intp).max:
        raise ValueError(f"{source}: tensor {name!r} has an impossible shape {tuple(dims)}")
    return raw.view(dtype).reshape(dims)
