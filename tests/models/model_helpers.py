"""Small models with inputs, random parameters, and writers of tiny weight files, for the tests here."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.models import Bert, Llama, Vit, small_bert, small_llama, small_vit


def tiny(kind, **overrides):
    """A tiny module of one kind and an input for it."""
    rng = np.random.default_rng(1)
    if kind == "vit":
        return Vit(small_vit(**overrides)), jnp.asarray(rng.normal(size=(2, 8, 12, 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 101, (2, 7)))
    if kind == "bert":
        return Bert(small_bert(**overrides)), tokens
    return Llama(small_llama(**overrides)), tokens


def random_params(module, *inputs, scale=0.2):
    """Parameters with no accidental zeros or ones, so that a swapped or skipped one shows."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale + 0.1, s.dtype), shapes)


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def run(module, params, *inputs):
    """One compiled call: much quicker than operation by operation."""
    return compiled(module)({"params": params}, *inputs)


def gguf_string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value):
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf_bytes(metadata, tensors, alignment=32):
    """A GGUF file; `tensors` maps a name to (shape, type number, raw bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += gguf_string(key) + gguf_value(value)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        out += gguf_string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    return out + b"\0" * (-len(out) % alignment) + data


def varint(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def proto_bytes(field, data):
    return varint(field << 3 | 2) + varint(len(data)) + data


def proto_number(field, value):
    return varint(field << 3) + varint(value)


def onnx_tensor(name, array, kind=1, dims=None, extra=b""):
    dims = array.shape if dims is None else dims
    out = b"".join(proto_number(1, d) for d in dims) + proto_number(2, kind)
    return out + proto_bytes(8, name.encode()) + proto_bytes(9, array.tobytes()) + extra


def onnx_bytes(tensors, nodes=()):
    """An ONNX file; `tensors` are `onnx_tensor`s, `nodes` are (name, operator, inputs)."""
    graph = b""
    for name, operator, inputs in nodes:
        node = b"".join(proto_bytes(1, i.encode()) for i in inputs)
        graph += proto_bytes(1, node + proto_bytes(3, name.encode()) + proto_bytes(4, operator.encode()))
    graph += b"".join(proto_bytes(5, tensor) for tensor in tensors)
    return proto_number(1, 7) + proto_bytes(2, b"a test") + proto_bytes(7, graph)
