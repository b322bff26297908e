"""How stand-in weights are joined: kernels side by side or stacked, with ordinary arrays among them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from subspace_jax.core._full import Full
from subspace_jax.core._interpret import Interpreter, rule
from subspace_jax.core._joined import Joined
from subspace_jax.core._observed import Observed
from subspace_jax.core._weight import Weight
from subspace_jax.core._weight_view import WeightView


@rule("concatenate")
def _concatenate(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _join(operands, eqn.params["dimension"])


@rule("stack")
def _stack(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any] | None:
    axis = eqn.params["axis"]

    def expanded(value: Any) -> Any:
        if not isinstance(value, WeightView):
            return jnp.expand_dims(value, axis)
        ordered = value.weight.permuted(value.permutation)
        weight = None if ordered is None else ordered.reshape((*value.shape[:axis], 1, *value.shape[axis:]))
        return None if weight is None else dataclasses.replace(WeightView.of(weight, value.path), dtype=value.dtype)

    found = [expanded(v) for v in operands]
    return None if any(v is None for v in found) else _join(found, axis)


def _join(operands: list[Any], axis: int) -> list[Any] | None:
    """The arrays and weights side by side; None where the weights are read in different ways."""
    views = [v for v in operands if isinstance(v, WeightView)]
    ordered = [v.weight.permuted(v.permutation) for v in views]
    weights = [w for w in ordered if w is not None]
    orders = {(w.role.stack_axes, w.role.in_axes, w.role.out_axes, isinstance(w, Observed)) for w in weights}
    if len(weights) < len(views) or len(orders) > 1:
        return None
    if isinstance(weights[0], Observed) and len(views) < len(operands):
        return None  # every leaf observes: what does not is an activation, as the tokens beside a class token
    rest = iter(weights)
    common: dict[str, Any] = {"role": weights[0].role, "dtype": views[0].dtype}

    def part(value: Any) -> Weight:
        return next(rest) if isinstance(value, WeightView) else Full(value=value, trainable=("value",), **common)

    names = tuple(v.path if isinstance(v, WeightView) else "" for v in operands)
    joined = Joined(parts=tuple(map(part, operands)), axis=axis, names=names, trainable=("parts",), **common)
    return [WeightView.of(joined, ", ".join(dict.fromkeys(filter(None, names))))]
