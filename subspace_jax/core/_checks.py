"""Checks of options, shared by all methods: each refuses at the call, naming what came and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core._errors import RankError


def check_int(what: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Returns an integer option as a Python int; NumPy integers are integers, booleans are not.

    Args:
      what: owner and name of the option, such as "flora: out_rank".
      value: what the caller gave.
      least: smallest value allowed.
      most: largest value allowed, if there is one.

    Raises:
      RankError: it is not an integer, or outside the range.

    Example:
      >>> import numpy as np
      >>> check_int("demo: rank", np.int64(4))
      4
    """
    expected = f"an int of at least {least}" + ("" if most is None else f" and at most {most}")
    hint = "; shapes are static under jit, so it cannot be traced"
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None:
        raise RankError(f"{what}={value!r}: expected {expected}{hint}.")
    if number < least or (most is not None and number > most):
        raise RankError(f"{what}={value!r}: expected {expected}.")
    return number


def check_rank(rank: Any, smaller_side: int | None = None, *, what: str = "rank") -> int:
    """Returns a rank as a Python int, positive and at most the smaller side of the weight where one is given.

    Raises:
      RankError: it is not.
    """
    number = check_int(what, rank)
    if smaller_side is not None and number > smaller_side:
        raise RankError(f"{what}={number} is above the weight's smaller side {smaller_side}; choose at most that.")
    return number


def check_choice(what: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a value that is not one of the choices.

    Raises:
      ValueError: it is not; the message lists them.
    """
    known = tuple(choices)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in known):
        raise ValueError(f"{what}={value!r}: expected one of {', '.join(repr(c) for c in known)}.")


def check_number(
    what: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuses a number outside a range; traced values, which have none yet, pass.

    Args:
      what: owner and name of the option, such as "lora: alpha".
      value: what the caller gave.
      above: the value must be larger than this.
      least: the value must be at least this.
      below: the value must be smaller than this.
      most: the value must be at most this.

    Raises:
      ValueError: it is not a finite real number, or outside the range.
    """
    if isinstance(value, Tracer):
        return
    limits = [("above", above, lambda v: v > above), ("at least", least, lambda v: v >= least)]
    limits += [("below", below, lambda v: v < below), ("at most", most, lambda v: v <= most)]
    given = [(word, limit, test) for word, limit, test in limits if limit is not None]
    expected = "a finite number" + "".join(f", {word} {limit:g}" for word, limit, _ in given)
    try:
        number = float(value) if not isinstance(value, (bool, str)) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not (abs(number) < float("inf") and all(test(number) for _, _, test in given)):
        raise ValueError(f"{what}={value!r}: expected {expected}.")


def check_probability(what: str, value: Any) -> None:
    """Refuses a dropout that is not a probability below 1.

    Raises:
      ValueError: it is not in [0, 1).
    """
    check_number(what, value, least=0.0, below=1.0)


def check_dtype(what: str, dtype: Any) -> np.dtype:
    """Returns the dtype of trained values: float32, bfloat16 or float64, in which optimizers work.

    float16 is refused. Adam squares gradients, and below 2.4e-4 their squares are zero in float16, as its epsilon of
    1e-8 is: a zero gradient then gives 0 / 0, and the adapter is NaN at the next step.

    Raises:
      ValueError: it is another dtype.

    Example:
      >>> check_dtype("demo: dtype", "bfloat16").name
      'bfloat16'
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found == jnp.float16 or found.itemsize < 2:
        why = " (Adam's squares and its epsilon underflow in float16: NaN)" if found == jnp.float16 else ""
        raise ValueError(
            f"{what}={found.name if found is not None else repr(dtype)}: expected jnp.float32, or jnp.bfloat16 where "
            f"memory is short{why}. The model's own arrays may stay as they are."
        )
    return found
