"""How a stand-in weight is cut: slices, layers and axes of size one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import _compat
from subspace_jax.core._interpret import Interpreter, rule
from subspace_jax.core._operations import Lookup
from subspace_jax.core._rules import answered, reshape, use_fields
from subspace_jax.core._weight_view import WeightView


@rule("slice")
def _slice(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    starts, limits, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    sizes = tuple(b - a for a, b in zip(starts, limits, strict=True))
    if strides is None or all(n == 1 for n in strides):
        return _slice_view(value, starts, sizes)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):

        def take(array: jax.Array, place: int, cut: Any = (start, limit, stride)) -> jax.Array:
            return lax.slice_in_dim(array, *cut, axis=place)

        whole = (start, limit, stride) == (0, value.shape[axis], 1)
        weight = value.weight if whole else value.weight.map_axis(value.permutation[axis], take)
        if weight is None:
            return None
        value = dataclasses.replace(value, weight=weight)
    return [value]


@rule("split")
def _split(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value, axis = operands[0], eqn.params["axis"]
    found, start = [], 0
    for size in map(int, eqn.params["sizes"]):
        starts = tuple(start if i == axis else 0 for i in range(len(value.shape)))
        sizes = tuple(size if i == axis else n for i, n in enumerate(value.shape))
        part = _slice_view(value, starts, sizes)
        if part is None:
            return None
        found += part
        start += size
    return found


@rule("dynamic_slice")
def _dynamic_slice(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value, *starts = operands
    sizes = tuple(eqn.params["slice_sizes"])
    looked_up = _lookup_of_one(interpreter, eqn, value, starts, sizes)
    if looked_up is not None:
        return looked_up
    if len(sizes) == 2 and sizes[0] == 1 and _compat.is_tracer(starts[0]):
        value.weight.observe_row()
    return _slice_view(value, starts, sizes)


def _lookup_of_one(
    interpreter: Interpreter, eqn: Any, value: WeightView, starts: Any, sizes: tuple[int, ...]
) -> list[Any] | None:
    """One row of an embedding table, which a lookup by a single index slices out."""
    cut = [i for i, (n, m) in enumerate(zip(sizes, value.shape, strict=True)) if n != m]
    if value.weight.role.kind != "embedding" or len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    axis = cut[0]
    operation = Lookup(
        **use_fields(interpreter, eqn, value),
        axis=axis,
        x_ndim=1,
        offset_dims=tuple(i for i in range(len(sizes)) if i != axis),
        parameters={"mode": lax.GatherScatterMode.CLIP},
    )
    return answered(value, jnp.reshape(starts[axis], (1, 1)), operation)


def _slice_view(value: WeightView, starts: Any, sizes: tuple[int, ...]) -> list[Any] | None:
    """Some whole layers of a stacked weight, or a part of the inputs or outputs of one that can be divided so."""
    cut = [i for i, (n, m) in enumerate(zip(sizes, value.shape, strict=True)) if n != m]
    weight = value.weight
    for i in cut:

        def take(array: jax.Array, axis: int, i: int = i) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, starts[i], sizes[i], axis)

        axis = value.permutation[i]
        stacked = value.is_stacked(i, loop=False)
        weight = weight.map_stacked(axis, take) if stacked else weight.map_axis(axis, take)
        if weight is None:
            return None
    return [dataclasses.replace(value, weight=weight)]


@rule("unstack")
def _unstack(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value, axis = operands[0], eqn.params["axis"]
    if not value.is_stacked(axis, loop=False):
        return _unstacked(value, axis)
    mapped, rebuild = value.split_stack(axis)
    return [rebuild(jax.tree.map(lambda v, i=i: v[i], mapped)) for i in range(value.shape[axis])]


def _unstacked(value: WeightView, axis: int) -> list[Any] | None:
    """Slices of size one along an axis of the matrices, as of kernels that the model has stacked before."""
    sizes = tuple(1 if i == axis else n for i, n in enumerate(value.shape))
    found = []
    for k in range(value.shape[axis]):
        cut = _slice_view(value, tuple(k if i == axis else 0 for i in range(len(sizes))), sizes)
        ordered = None if cut is None else cut[0].weight.permuted(cut[0].permutation)
        weight = None if ordered is None else ordered.reshape(tuple(n for i, n in enumerate(sizes) if i != axis))
        if weight is None:
            return None
        found.append(dataclasses.replace(WeightView.of(weight, value.path), dtype=value.dtype))
    return found


@rule("squeeze")
def _squeeze(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    for axis in sorted((d % len(value.shape) for d in eqn.params["dimensions"]), reverse=True):
        if not value.is_stacked(axis, loop=False):
            return reshape(interpreter, eqn, operands)
        mapped, rebuild = value.split_stack(axis)
        value = rebuild(jax.tree.map(lambda v: jnp.squeeze(v, 0), mapped))
    return [value]
