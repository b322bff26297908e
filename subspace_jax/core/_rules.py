"""How each primitive treats a stand-in weight: contract it, carry it along, or refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from subspace_jax.core import _compat
from subspace_jax.core._interpret import Interpreter, rule
from subspace_jax.core._operations import Convolution, Dot, Lookup, RaggedDot
from subspace_jax.core._weight_view import WeightView


def _use_fields(interpreter: Interpreter, eqn: Any, value: WeightView) -> dict[str, Any]:
    return {
        "role": value.weight.role,
        "shape": value.weight.shape,
        "permutation": value.permutation,
        "dtype": value.dtype,
        "out_dtype": eqn.outvars[0].aval.dtype,
        "path": interpreter.path,
        "context": interpreter.context,
        "name": value.path,
    }


@rule("dot_general")
def _dot_general(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    left, right = operands
    weight_first = isinstance(left, WeightView)
    if weight_first and isinstance(right, WeightView):
        right = interpreter.form(right, "dot_general")
    value, x = (left, right) if weight_first else (right, left)
    parameters = dict(eqn.params)
    operation = Dot(
        **_use_fields(interpreter, eqn, value),
        dimension_numbers=parameters.pop("dimension_numbers"),
        weight_first=weight_first,
        x_ndim=x.ndim,
        parameters=parameters,
    )
    return [value.weight.contract(x, operation)]


@rule("conv_general_dilated")
def _conv_general_dilated(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, value = operands
    if isinstance(x, WeightView):
        return None
    operation = Convolution(**_use_fields(interpreter, eqn, value), parameters=dict(eqn.params))
    return [value.weight.contract(x, operation)]


@rule("ragged_dot_general")
def _ragged_dot(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, value, group_sizes = operands[:3]
    p = dict(eqn.params)
    numbers = p.pop("ragged_dot_dimension_numbers")
    usual = (numbers.dot_dimension_numbers, tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions))
    plain = [_tuples(part) for part in usual]
    sorted_rows = plain == [(((1,), (1,)), ((), ())), (0,), (0,)]
    if isinstance(x, WeightView) or not isinstance(value, WeightView) or not sorted_rows or p.pop("group_offset", None):
        return None
    weight = value.weight.permuted(value.permutation)
    if weight is None:
        return None
    value = dataclasses.replace(value, weight=weight, permutation=tuple(range(weight.ndim)))
    role = weight.role
    if role.is_matrix and (role.stack_axes, role.in_axes, role.out_axes) != ((0,), (1,), (2,)):
        return None
    kept = {k: v for k, v in p.items() if k in ("precision", "preferred_element_type")}
    operation = RaggedDot(**_use_fields(interpreter, eqn, value), group_sizes=group_sizes, parameters=kept)
    return [weight.contract(x, operation)]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (tuple, list)) else int(value)


@rule("gather")
def _gather(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value, indices = operands
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(sizes) if n != value.shape[i] or i in numbers.collapsed_slice_dims]
    if isinstance(indices, WeightView) or len(cut) != 1 or sizes[cut[0]] != 1 or numbers.operand_batching_dims:
        return None
    axis, collapsed = cut[0], tuple(numbers.collapsed_slice_dims)
    if collapsed not in ((), (axis,)) or axis not in numbers.start_index_map:
        return None
    # Other components of an index can only say where a whole axis starts, which is 0 where it is clipped.
    alone = tuple(numbers.start_index_map) == (axis,)
    clipped = eqn.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if not (alone or clipped) or _is_number(eqn.params["fill_value"]):  # a sum of parts would add a number up
        return None
    offsets, kept_axis = list(numbers.offset_dims), None
    if not collapsed:  # the looked-up axis stays, of size one
        kept_axis = offsets.pop(axis)
        offsets = [i - (i > kept_axis) for i in offsets]
    component = numbers.start_index_map.index(axis)
    kept = ("indices_are_sorted", "unique_indices", "mode", "fill_value")
    operation = Lookup(
        **_use_fields(interpreter, eqn, value),
        axis=axis,
        x_ndim=indices.ndim - 1,
        offset_dims=tuple(offsets),
        parameters={k: eqn.params[k] for k in kept},
    )
    found = value.weight.contract(indices if alone else indices[..., component : component + 1], operation)
    return [found if kept_axis is None else jnp.expand_dims(found, kept_axis)]


def _is_number(fill: Any) -> bool:
    return fill is not None and fill != 0 and not np.isnan(fill)


@rule("convert_element_type")
def _convert_element_type(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    dtype = np.dtype(eqn.params["new_dtype"])
    return [operands[0].cast(dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


@rule("transpose")
def _transpose(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return [operands[0].transpose(tuple(eqn.params["permutation"]))]


@rule("stop_gradient")
def _stop_gradient(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return [jax.tree.map(lax.stop_gradient, operands[0])]


@rule("copy", "copy_p", "name", "optimization_barrier", "device_put", "pvary", "pcast", "layout_constraint")
def _carry_along(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return list(operands)


@rule("sharding_constraint", "reshard")
def _place(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Places the parts as the model places the whole: a model that gathers a weight gathers its factors too."""
    value = operands[0]
    field = "dst_sharding" if eqn.primitive.name == "reshard" else "sharding"
    sharding = eqn.params[field]
    if not isinstance(sharding, NamedSharding):
        return [value]

    def one(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        changes: dict[str, Any] = {field: NamedSharding(sharding.mesh, spec)}
        if "unconstrained_dims" in eqn.params:
            free = (i for i, entry in enumerate(spec) if entry is PartitionSpec.UNCONSTRAINED)
            changes["unconstrained_dims"] = frozenset(free)
        return _compat.bind(eqn, [array], **changes)[0]

    return [jax.tree.map(one, value, value.partition_specs(sharding.spec))]


@rule("reshape", "expand_dims")
def _reshape(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
        value = value.transpose(tuple(eqn.params["dimensions"]))
    new_sizes = tuple(eqn.outvars[0].aval.shape)
    if new_sizes == value.shape:
        return [value]
    ordered = value.weight.permuted(value.permutation)
    reshaped = None if ordered is None else ordered.reshape(new_sizes)
    if reshaped is None:
        return _derive(value, lambda array: array.reshape(new_sizes))
    return [dataclasses.replace(value, weight=reshaped, permutation=tuple(range(len(new_sizes))))]


@rule("broadcast_in_dim")
def _broadcast_in_dim(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if math.prod(shape) == math.prod(operands[0].shape) and list(dims) == sorted(dims):
        return _reshape(interpreter, eqn, operands)
    return _derive(operands[0], lambda array: lax.broadcast_in_dim(array, shape, dims))


def _derive(value: WeightView, function: Callable[[jax.Array], jax.Array]) -> list[Any] | None:
    """Follows a weight that only observes through an operation on shapes."""
    derived = value.weight.derived(lambda array: function(jnp.transpose(array, value.permutation)))
    return None if derived is None else [dataclasses.replace(WeightView.of(derived, value.path), dtype=value.dtype)]


@rule("slice")
def _slice(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    starts, limits, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    sizes = tuple(b - a for a, b in zip(starts, limits, strict=True))
    if strides is None or all(n == 1 for n in strides):
        return _slice_stack(value, starts, sizes)
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
        part = _slice_stack(value, starts, sizes)
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
    return _slice_stack(value, starts, sizes)


def _lookup_of_one(
    interpreter: Interpreter, eqn: Any, value: WeightView, starts: Any, sizes: tuple[int, ...]
) -> list[Any] | None:
    """One row of an embedding table, which a lookup by a single index slices out."""
    cut = [i for i, (n, m) in enumerate(zip(sizes, value.shape, strict=True)) if n != m]
    if value.weight.role.kind != "embedding" or len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    axis = cut[0]
    operation = Lookup(
        **_use_fields(interpreter, eqn, value),
        axis=axis,
        x_ndim=1,
        offset_dims=tuple(i for i in range(len(sizes)) if i != axis),
        parameters={"mode": lax.GatherScatterMode.CLIP},
    )
    return [value.weight.contract(jnp.reshape(starts[axis], (1, 1)), operation)]


def _slice_stack(value: WeightView, starts: Any, sizes: tuple[int, ...]) -> list[Any] | None:
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
        return None
    mapped, rebuild = value.split_stack(axis)
    return [rebuild(jax.tree.map(lambda v, i=i: v[i], mapped)) for i in range(value.shape[axis])]


@rule("squeeze")
def _squeeze(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    value = operands[0]
    for axis in sorted((d % len(value.shape) for d in eqn.params["dimensions"]), reverse=True):
        if not value.is_stacked(axis, loop=False):
            return _reshape(interpreter, eqn, operands)
        mapped, rebuild = value.split_stack(axis)
        value = rebuild(jax.tree.map(lambda v: jnp.squeeze(v, 0), mapped))
    return [value]
