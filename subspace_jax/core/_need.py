"""What a method asks `capture` for, and the statistics of inputs that can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core._errors import StatisticsError
from subspace_jax.core._labels import product

ScaleExamples = Literal["max_abs", "signed_max"]


class Need(NamedTuple):
    """A statistic of a weight, and how it is to be gathered.

    Attributes:
      statistic: its name, such as "gram", "gradient", or one that `register_statistic` added.
      scale_examples: as in `capture`; None for inputs as they are.
    """

    statistic: str
    scale_examples: ScaleExamples | None = None


class InputStatistic(NamedTuple):
    """A sum over the rows that a weight is multiplied with.

    Attributes:
      shape: its shape for one matrix, from the numbers of inputs and outputs; stacked weights have one each.
      sum: makes it of rows `[*stack, n, in]` in float32, those that do not count being zeros.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    sum: Callable[[jax.Array], jax.Array]


def _gram(rows: jax.Array) -> jax.Array:
    stack = tuple(f"stack {i}" for i in range(rows.ndim - 2))
    left, right = (*stack, "row", "in"), (*stack, "row", "in again")
    return product(rows, left, rows, right, (*stack, "in", "in again"), precision=lax.Precision.HIGHEST)


_INPUT_STATISTICS = {
    "gram": InputStatistic(lambda inputs, outputs: (inputs, inputs), _gram),
    "mean": InputStatistic(lambda inputs, outputs: (inputs,), lambda rows: jnp.sum(rows, axis=-2)),
}


def register_statistic(name: str, statistic: InputStatistic) -> None:
    """Adds a statistic of inputs that methods can need; the package that uses it does this once.

    `capture` returns the sum over all rows in `Statistics.extra[name]`.

    Args:
      name: what `needs` and `capture(statistics=...)` call it.
      statistic: its shape and its sum.

    Raises:
      StatisticsError: another statistic has the name.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> squares = sj.core.InputStatistic(lambda inputs, outputs: (inputs,), lambda rows: jnp.sum(rows**2, axis=-2))
      >>> sj.core.register_statistic("input_squares", squares)
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> found = sj.capture(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 5))}, [x], statistics="input_squares")
      >>> found["w"].extra["input_squares"].tolist()
      [10.0, 20.0]
    """
    if _INPUT_STATISTICS.get(name, statistic) != statistic or name in ("gradient", "squared_gradient"):
        raise StatisticsError(f"register_statistic: {name!r} is taken by another statistic; choose another name.")
    _INPUT_STATISTICS[name] = statistic


def input_statistics() -> dict[str, InputStatistic]:
    """Returns every statistic of inputs by name."""
    return dict(_INPUT_STATISTICS)
