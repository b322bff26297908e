"""Minimizing one loss until it stops to change, without a look at any label."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import check_int, check_number

Objective = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    r"""When a stage ends: the mean loss of a window differs from that of the window before by less than a tolerance.

    Adam oscillates, so that two losses in a row are nearly equal at every turning point; means over ten iterations are
    not. `StoppingRule(window=1, tolerance=1e-3, hits=5)` asks for five small changes in a row instead.

    Attributes:
      window: iterations that are averaged.
      tolerance: of \(|\bar J_t - \bar J_{t-1}| / \bar J_{t-1}\).
      hits: how many windows in a row must pass.
      least: iterations that are always run.
      most: iterations after which the stage ends anyway.

    Example:
      >>> StoppingRule(most=300).window
      10
    """

    window: int = 10
    tolerance: float = 3e-3
    hits: int = 1
    least: int = 10
    most: int = 1000

    def __post_init__(self) -> None:
        for name in ("window", "hits", "most"):
            check_int(f"StoppingRule: {name}", getattr(self, name))
        check_int("StoppingRule: least", self.least, 0, self.most)
        check_number("StoppingRule: tolerance", self.tolerance, least=0.0)


class Minimized(NamedTuple):
    """The end of a stage.

    Attributes:
      variables: at the end.
      losses: of every iteration, `[most]`; NaN after the last.
      iterations: how many were run.
    """

    variables: Any
    losses: jax.Array
    iterations: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 3))
def minimize(
    objective: Objective, variables: Any, data: Any, rule: StoppingRule, learning_rate: float | jax.Array = 1e-3
) -> Minimized:
    """Runs full-batch Adam on one loss until the rule ends it, all in one program.

    Args:
      objective: `objective(variables, data)`, a scalar; compiled once for each that is equal and hashes alike.
      variables: what is trained, a tree of arrays.
      data: what is not.
      rule: when to stop.
      learning_rate: of Adam.

    Returns:
      Variables, losses and the number of iterations.

    Example:
      >>> import jax.numpy as jnp
      >>> found = minimize(lambda x, c: jnp.sum((x - c) ** 2) + 1, jnp.zeros(2), jnp.full(2, 0.01), StoppingRule())
      >>> int(found.iterations) < 1000
      True
    """
    adam = optax.adam(learning_rate)
    gradient = jax.value_and_grad(objective)

    def step(carry: Any) -> Any:
        values, state, losses, t, total, before, hits = carry
        loss, change = gradient(values, data)
        updates, state = adam.update(change, state, values)
        total = total + loss
        at_end = (t + 1) % rule.window == 0
        mean = total / rule.window
        small = jnp.abs(mean - before) < rule.tolerance * jnp.maximum(before, 1e-12)
        hits = jnp.where(at_end, jnp.where(small, hits + 1, 0), hits)
        before, total = jnp.where(at_end, mean, before), jnp.where(at_end, 0.0, total)
        return optax.apply_updates(values, updates), state, losses.at[t].set(loss), t + 1, total, before, hits

    def goes_on(carry: Any) -> jax.Array:
        *_, t, _, _, hits = carry
        return (t < rule.most) & ((t < rule.least) | (hits < rule.hits))

    shape = jax.eval_shape(objective, variables, data)
    # Before the first window there is nothing to compare with: minus one is no mean of losses.
    start = (
        variables,
        adam.init(variables),
        jnp.full(rule.most, jnp.nan, shape.dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), shape.dtype),
        jnp.full((), -1.0, shape.dtype),
        jnp.zeros((), jnp.int32),
    )
    values, _, losses, t, *_ = jax.lax.while_loop(goes_on, step, start)
    return Minimized(values, losses, t)
