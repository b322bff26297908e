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
from subspace_jax.core._operation import Operation
from subspace_jax.core._operations import Convolution, Dot, Lookup, RaggedDot
from subspace_jax.core._weight_view import WeightView


def use_fields(interpreter: Interpreter, eqn: Any, value: WeightView) -> dict[str, Any]:
    """Returns what every operation says of the weight it meets."""
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
        **use_fields(interpreter, eqn, value),
        dimension_numbers=parameters.pop("dimension_numbers"),
        weight_first=weight_first,
        x_ndim=x.ndim,
        parameters=parameters,
    )
    return answered(value, x, operation)


def answered(value: WeightView, x: Any, operation: Operation) -> list[Any] | None:
    """Returns what the weight gives for an operation; None where the array has to be formed."""
    return [value.weight.contract(x, operation)] if value.weight.answers(operation) else None


@rule("conv_general_dilated")
def _conv_general_dilated(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, value = operands
    if isinstance(x, WeightView):
        return None
    operation = Convolution(**use_fields(interpreter, eqn, value), parameters=dict(eqn.params))
    return answered(value, x, operation)


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
    operation = RaggedDot(**use_fields(interpreter, eqn, value), group_sizes=group_sizes, parameters=kept)
    return answered(value, x, operation)


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
        **use_fields(interpreter, eqn, value),
        axis=axis,
        x_ndim=indices.ndim - 1,
        offset_dims=tuple(offsets),
        parameters={k: eqn.params[k] for k in kept},
    )
    results = answered(value, indices if alone else indices[..., component : component + 1], operation)
    if results is None:
        return None
    found = results[0]
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
def reshape(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Returns the weight of the reshaped array; None where its new axes cut across matrices."""
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
        return reshape(interpreter, eqn, operands)
    return _derive(operands[0], lambda array: lax.broadcast_in_dim(array, shape, dims))


def _derive(value: WeightView, function: Callable[[jax.Array], jax.Array]) -> list[Any] | None:
    """Follows a weight that only observes through an operation on shapes."""
    derived = value.weight.derived(lambda array: function(jnp.transpose(array, value.permutation)))
    return None if derived is None else [dataclasses.replace(WeightView.of(derived, value.path), dtype=value.dtype)]
