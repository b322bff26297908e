"""What Flax NNX asks of a library that traces functions of its objects; nothing of Flax is imported here."""

from __future__ import annotations

import sys
from typing import Any

_RECIPE = (
    "subspace_jax: the function changes variables of a module that was made outside, such as statistics of a BatchNorm "
    "or counters of random numbers. Split the module, pass what changes as an argument and return it:\n"
    "    graph, params, rest = nnx.split(model, nnx.Param, ...)\n"
    "    def fn(params, rest, x):\n"
    "        model = nnx.merge(graph, params, rest)\n"
    "        y = model(x)\n"
    "        return y, nnx.split(model, nnx.Param, ...)[2]\n"
    "    y, rest = sj.with_adapters(fn)(adapted, rest, x)"
)


def is_nnx_variable(value: Any) -> bool:
    """Tells whether a value is an NNX variable, which a function may only change if its own trace made it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)


def is_nnx_module(value: Any) -> bool:
    """Tells whether a value is a live NNX module, which a function changes in place."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def advise(error: Exception) -> None:
    """Adds to Flax's error about variables of another trace what to do; other errors stay as they are."""
    if type(error).__name__ == "TraceContextError":
        error.add_note(_RECIPE)
