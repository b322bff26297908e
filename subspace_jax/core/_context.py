"""What flows through a model's program beside its own values: a state of stand-ins, and values that they report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass
class Context:
    """The state at one point of an evaluation, and what was reported so far.

    Every body of a loop, a branch or a rematerialized part gets one of its own, whose contents the interpreter hands
    in and out as operands, so nothing that is traced inside is read outside.

    Attributes:
      state: arrays by name, written and read by stand-ins in the order of evaluation.
      reports: reported arrays by path of the weight, a list of all reports of one weight in the order of evaluation.
      collect: whether reports are kept.
      lasting_names: of entries that a loop over layers carries even if nothing was there before it; one set for all
        contexts of an evaluation.
    """

    state: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    reports: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    collect: bool = False
    lasting_names: set[str] = dataclasses.field(default_factory=set)

    def read(self, name: str) -> jax.Array | None:
        """Returns what was written under a name, None if nothing was."""
        return self.state.get(name)

    def write(self, name: str, value: jax.Array, *, lasting: bool = False) -> None:
        """Writes a value under a name.

        Args:
          name: of the value.
          value: inside a loop over layers it lasts from one to the next if it was there before, of this shape.
          lasting: it lasts also if it was not: then the first layer reads zeros. Of weights with `keeps_state`.
        """
        if lasting:
            self.lasting_names.add(name)
        self.state[name] = value

    def report(self, path: str, value: Any) -> None:
        """Reports a tree of arrays, which `with_adapters(fn, collect=True)` returns by path."""
        if self.collect:
            self.reports.setdefault(path, []).append(value)

    def inner(self) -> Context:
        """Returns the context of a body that starts from here."""
        return self.of(self.state)

    def of(self, state: Mapping[str, jax.Array]) -> Context:
        """Returns the context of a body that starts from another state."""
        return Context(dict(state), {}, self.collect, self.lasting_names)

    def lasting(self, inner: Context) -> dict[str, jax.Array]:
        """Returns the part of an inner state that can go on: entries that were here before, of the same type."""
        kept = {}
        for name, value in self.state.items():
            found = inner.state.get(name, value)
            same = (found.shape, found.dtype) == (value.shape, value.dtype)
            kept[name] = found if same else value
        return kept

    def add_reports(self, reports: dict[str, list[Any]]) -> None:
        """Adds what an inner body reported."""
        for path, values in reports.items():
            self.reports.setdefault(path, []).extend(values)


def zeros_of(reports: Any) -> Any:
    """Returns zeros in place of every reported array."""
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), reports)


def unseen_state(outside: Context, layer_of: Callable[..., Any], carry: Any, slices: Any) -> dict[str, jax.Array]:
    """Returns zeros for the lasting state that the layers of a loop write and nothing before it did.

    Args:
      outside: the context before the loop.
      layer_of: `layer_of(context, carry, one)`, which evaluates a layer.
      carry: of the loop.
      slices: what the loop runs over; every layer gets a slice along the first axis.
    """

    def written(carry: Any, slices: Any) -> dict[str, jax.Array]:
        context = Context(dict(outside.state), {}, False, outside.lasting_names)
        layer_of(context, carry, slices)
        return {n: v for n, v in context.state.items() if n in context.lasting_names and n not in outside.state}

    found = jax.eval_shape(written, carry, jax.tree.map(lambda v: v[0], slices))
    return {name: jnp.zeros(v.shape, v.dtype) for name, v in found.items()}
