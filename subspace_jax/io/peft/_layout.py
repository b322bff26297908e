"""Converts arrays of a tree to PyTorch's layout and back; the one place where (in, out) becomes (out, in).

All arrays here are NumPy's, of one module each; stacked axes are split and joined by `unstack` and `stack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from subspace_jax.io._array import array_spec, on_host
from subspace_jax.io.peft._names import TensorPlace


def host_array(value: Any, where: str) -> np.ndarray:
    """Returns an array as NumPy's; raises ManifestError for one that is traced, deleted or on other hosts."""
    array_spec(value, where)
    return on_host(value, where)


def unstack(array: Any, place: TensorPlace, where: str) -> list[np.ndarray]:
    """Returns the part of each module of an array whose leading axes are the stacked ones."""
    host = host_array(array, where)
    return list(host.reshape(len(place.modules), *host.shape[place.depth :]))


def stack(parts: Sequence[np.ndarray], place: TensorPlace) -> np.ndarray:
    """Returns the array whose part of each module is given; the inverse of `unstack`."""
    return np.stack(parts).reshape(*place.stack, *parts[0].shape)


def whole_to_torch(array: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns a module's own array as its tensor."""
    if place.rule.kind == "array":
        return array
    if not place.role.is_matrix:
        return array.reshape(-1)
    match place.rule.kind:
        case "dense":
            return array.reshape(sizes(place)).T
        case "conv":
            return np.moveaxis(array, (-1, -2), (0, 1))
        case _:
            return array


def whole_from_torch(tensor: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the array of a module's tensor; the inverse of `whole_to_torch`."""
    if place.role.is_matrix and place.rule.kind == "dense":
        tensor = tensor.T
    elif place.role.is_matrix and place.rule.kind == "conv":
        tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
    return tensor.reshape(place.inner)


def whole_shape(place: TensorPlace) -> tuple[int, ...]:
    """Returns the shape of a module's own tensor."""
    return whole_to_torch(np.broadcast_to(np.int8(0), place.inner), place).shape


def factor_names(place: TensorPlace) -> tuple[str, str]:
    """Returns what PEFT calls the two factors of a module."""
    if place.rule.kind == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def input_factor_to_torch(a: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the factor `[in, rank]` as PEFT has it: `(rank, in)`, or a convolution's `(rank, in, *window)`."""
    if place.rule.kind == "conv":
        return np.moveaxis(a.reshape(*place.inner[:-1], -1), (-1, -2), (0, 1))
    return a.T


def input_factor_from_torch(tensor: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the factor `[in, rank]`; the inverse of `input_factor_to_torch`."""
    if place.rule.kind == "conv":
        tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.T


def output_factor_to_torch(b: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the factor `[rank, out]` as PEFT has it: `(out, rank)`, with a window of one for convolutions."""
    return b.T.reshape(*b.T.shape, *_ones(place))


def output_factor_from_torch(tensor: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the factor `[rank, out]`; the inverse of `output_factor_to_torch`."""
    return tensor.reshape(tensor.shape[: tensor.ndim - len(_ones(place))]).T


def factor_shapes(rank: int, place: TensorPlace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of PEFT's two factors of a module."""
    inputs, outputs = sizes(place)
    a, b = (np.broadcast_to(np.int8(0), shape) for shape in ((inputs, rank), (rank, outputs)))
    return input_factor_to_torch(a, place).shape, output_factor_to_torch(b, place).shape


def magnitude_to_torch(magnitude: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns column lengths `[out]` as PEFT has them: `(1, out, 1, 1)` for an image convolution."""
    return magnitude.reshape(magnitude_shape(place))


def magnitude_shape(place: TensorPlace) -> tuple[int, ...]:
    """Returns the shape of PEFT's lengths of a module."""
    outputs = sizes(place)[1]
    return (1, outputs, *_ones(place)) if place.rule.kind == "conv" else (outputs,)


def _sizes(place: TensorPlace) -> tuple[int, int]:
    """The input and the output size of one module."""
    return place.role.sizes(place.shape)


def _ones(place: TensorPlace) -> tuple[int, ...]:
    return (1,) * (len(place.inner) - 2) if place.rule.kind == "conv" else ()


def sizes(place: TensorPlace) -> tuple[int, int]:
    """Returns the input and the output size of one module."""
    return place.role.sizes(place.shape)
