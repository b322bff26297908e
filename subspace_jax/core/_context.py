"""What flows through a model's program beside its own values: a state of stand-ins, and values that they report."""

from __future__ import annotations

import dataclasses
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
    """

    state: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    reports: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    collect: bool = False

    def read(self, name: str) -> jax.Array | None:
        """Returns what was written under a name, None if nothing was."""
        return self.state.get(name)

    def write(self, name: str, value: jax.Array) -> None:
        """Writes a value under a name; inside a loop over layers it lasts if it was there before, of this shape."""
        self.state[name] = value

    def report(self, path: str, value: Any) -> None:
        """Reports a tree of arrays, which `with_adapters(fn, collect=True)` returns by path."""
        if self.collect:
            self.reports.setdefault(path, []).append(value)

    def inner(self) -> Context:
        """Returns the context of a body that starts from here."""
        return Context(dict(self.state), {}, self.collect)

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
