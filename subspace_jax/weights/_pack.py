"""Makes weights of the blocks of a GGUF file, one by one and as stacks of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Role

from ._gguf_blocks import BLOCK_KINDS, row_bytes
from ._packed import Packed


def pack_blocks(
    rows: np.ndarray | jax.Array, kind: str, role: Role, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Packed:
    """Returns the weight of one array whose blocks are given.

    Args:
      rows: `[rows, bytes]` uint8, as the file has them; rows may be in another order than there.
      kind: of the blocks, such as `"Q4_K"`.
      role: of the array; of an embedding the rows are its inputs, of any other its outputs.
      shape: of the array.
      dtype: that it stands for.

    Raises:
      ValueError: a kind that is not known, or blocks that are not as many as the array needs.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> block = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.arange(32, dtype=np.uint8)])
      >>> pack_blocks(block[None], "Q8_0", Role.embedding(), (1, 32)).materialize()[0, :4]
      Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    if kind not in BLOCK_KINDS:
        raise ValueError(f"pack_blocks: blocks of kind {kind!r}; expected one of {', '.join(BLOCK_KINDS)}")
    role.check(shape)
    order = "in_out" if role.kind == "embedding" else "out_in"
    inputs, outputs = role.sizes(shape)
    count, values = (outputs, inputs) if order == "out_in" else (inputs, outputs)
    expected = (count, row_bytes(kind, values))
    if values % BLOCK_KINDS[kind].values or tuple(rows.shape) != expected or rows.dtype != np.uint8:
        raise ValueError(
            f"pack_blocks: {rows.dtype}{list(rows.shape)} of {kind} for an array of shape {shape}; expected uint8"
            f"{list(expected)}, and rows of {values} values in blocks of {BLOCK_KINDS[kind].values}"
        )
    return Packed(
        blocks=rows,  # pyright: ignore[reportArgumentType]
        kinds=(kind,),
        in_sizes=role.in_shape(shape),
        out_sizes=role.out_shape(shape),
        order=order,
        role=role,
        dtype=np.dtype(dtype),
        trainable=(),
        method="packed",
    )


def stack_packed(layers: Sequence[Packed]) -> Packed:
    """Returns the weight of a stack of layers, whose kinds of blocks may differ.

    Args:
      layers: one weight each, alike in everything but kind and bytes; their blocks may still be NumPy's.

    Returns:
      The weight with the layers along a new leading axis, in NumPy arrays. Where kinds differ, rows are padded to the
      longest.

    Raises:
      ValueError: the layers stand for arrays of other shapes or roles.
    """
    first = layers[0]
    if any((w.shape, w.role, w.order, w.dtype) != (first.shape, first.role, first.order, first.dtype) for w in layers):
        raise ValueError(f"stack_packed: layers of shapes {[w.shape for w in layers]} and several roles or dtypes.")
    if any(len(w.kinds) > 1 for w in layers):
        raise ValueError("stack_packed: a layer is a stack of several kinds already.")
    kinds = tuple(dict.fromkeys(w.kinds[0] for w in layers))
    longest = max(w.blocks.shape[-1] for w in layers)
    joined = np.zeros((len(layers), *first.blocks.shape[:-1], longest), np.uint8)
    for one, layer in zip(joined, layers, strict=True):
        one[..., : layer.blocks.shape[-1]] = layer.blocks
    role = first.role
    axes = {n: tuple(i + 1 for i in getattr(role, n)) for n in ("stack_axes", "in_axes", "out_axes")}
    axes["stack_axes"] = (0, *axes["stack_axes"])
    kind = np.array([kinds.index(w.kinds[0]) for w in layers], np.int32)
    return dataclasses.replace(
        first,
        blocks=joined,  # pyright: ignore[reportArgumentType]
        kind=kind if len(kinds) > 1 else None,
        kinds=kinds,
        role=dataclasses.replace(role, **axes),
    )
