"""Finds the task of an input by class prototypes of the frozen model's features; -1 for none that is known."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import check_int


class TaskSelector(NamedTuple):
    """Tells an input's task by the nearest prototype of a class.

    Attributes:
      prototypes: `[tasks, classes, width]`, mean of the class's features of length one.
      known: booleans `[tasks, classes]`.
      thresholds: `[tasks]`, the least similarity at which an input is taken for one of the task's.
    """

    prototypes: jax.Array
    known: jax.Array
    thresholds: jax.Array


def init_selector(tasks: int, classes: int, width: int) -> TaskSelector:
    """Returns a selector that knows no task.

    Args:
      tasks: number of tasks that there is room for.
      classes: largest number of classes of a task.
      width: number of features.

    Example:
      >>> init_selector(2, 3, 4).prototypes.shape
      (2, 3, 4)
    """
    tasks, classes = check_int("init_selector: tasks", tasks), check_int("init_selector: classes", classes)
    width = check_int("init_selector: width", width)
    never = jnp.full((tasks,), jnp.inf, jnp.float32)
    return TaskSelector(jnp.zeros((tasks, classes, width)), jnp.zeros((tasks, classes), bool), never)


def add_task(
    selector: TaskSelector, task: int | jax.Array, features: jax.Array, labels: jax.Array, share: float = 0.05
) -> TaskSelector:
    r"""Returns the selector with a task's prototypes and threshold, from its training examples.

    The threshold is a quantile of the examples' own similarities, each without its part in its prototype: a sample is
    close to a mean that it is in, and fresh ones would all fall below. Where no class has two examples there is
    nothing to measure, and the task refuses no input.

    Args:
      selector: the selector.
      task: number of the task.
      features: the frozen model's, `[rows, width]`.
      labels: classes `[rows]`, from zero in every task.
      share: of the task's own examples that falls below, 0.05 for the 5th percentile.

    Example:
      >>> import jax.numpy as jnp
      >>> selector = add_task(init_selector(2, 2, 2), 0, jnp.eye(2), jnp.array([0, 1]))
      >>> selector.known.tolist(), selector.thresholds.tolist()
      ([[True, True], [False, False]], [-inf, inf])
    """
    unit, classes = _unit(features), selector.known.shape[1]
    members = jax.nn.one_hot(labels, classes)
    counts, totals = members.sum(0), jnp.matmul(members.T, unit, precision=lax.Precision.HIGHEST)
    known = counts > 0
    prototypes = totals / jnp.maximum(counts, 1.0)[:, None]
    others = jnp.where(members > 0, -2.0, _cosines(unit, prototypes, known))
    own = jnp.sum(_unit(totals[labels] - unit) * unit, -1)
    measured = counts[labels] > 1
    scores = jnp.maximum(jnp.max(others, -1), own)
    threshold = jnp.nanquantile(jnp.where(measured, scores, jnp.nan), share)
    threshold = jnp.where(jnp.any(measured), threshold, -jnp.inf)
    return TaskSelector(
        selector.prototypes.at[task].set(prototypes),
        selector.known.at[task].set(known),
        selector.thresholds.at[task].set(threshold),
    )


def select_task(selector: TaskSelector, features: jax.Array) -> jax.Array:
    """Returns the task of the nearest prototype for every row, or -1 if it is further than that task's threshold.

    Args:
      selector: the selector.
      features: the frozen model's, `[rows, width]`.

    Returns:
      int32 `[rows]`; give it to `at_task`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.1, 1.0], [0.0, 1.0]])
      >>> selector = add_task(init_selector(2, 1, 2), 0, x[:2], jnp.zeros(2, int))
      >>> select_task(add_task(selector, 1, x[2:], jnp.zeros(2, int)), x).tolist()
      [0, 0, 1, 1]
    """
    tasks, classes, width = selector.prototypes.shape
    scores = _cosines(_unit(features), selector.prototypes.reshape(-1, width), selector.known.reshape(-1))
    scores = jnp.max(scores.reshape(-1, tasks, classes), -1)
    best = jnp.argmax(scores, -1)
    near = jnp.max(scores, -1) >= selector.thresholds[best]
    return jnp.where(near, best, -1).astype(jnp.int32)


def _cosines(unit: jax.Array, prototypes: jax.Array, known: jax.Array) -> jax.Array:
    found = jnp.matmul(unit, _unit(prototypes).T, precision=lax.Precision.HIGHEST)
    return jnp.where(known, found, -2.0)


def _unit(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
