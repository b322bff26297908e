"""Makes a learner from its own parts, with what all share: order of calls, the step, fresh moments for every task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from subspace_jax.continual._learner import (
    Learner,
    LearnerState,
    Loss,
    Update,
    adapted_of,
    check_end,
    check_start,
    end_state,
    init_opt_state,
    initial_state,
    make_step,
)
from subspace_jax.core import Batch, OptState, Params, PyTree, Updates


def plain_update(optimizer: optax.GradientTransformation) -> Update:
    """Returns the update of a learner that gives gradients to its optimizer as they are."""

    def update(gradients: Updates, state: LearnerState, trainable: Params, frozen: Params) -> tuple[Updates, OptState]:
        del frozen
        return optimizer.update(gradients, state.opt_state, trainable)

    return update


def make_learner(
    name: str,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    adapt: Callable[[Params, jax.Array], Params],
    memory: Callable[[Params], PyTree] | None = None,
    start: Callable[..., LearnerState] | None = None,
    end: Callable[[LearnerState, int, Iterable[Batch]], LearnerState] | None = None,
    update: Update | None = None,
    penalty: Callable[[Params], jax.Array] | None = None,
    tasks: int | None = None,
    plan: Callable[[LearnerState, int], Any] | None = None,
) -> Learner:
    """Makes a learner from the parts that are its own: how it adapts, remembers and updates.

    Checks of the order of calls, the compiled step, and moments that begin anew with every task are the same for all.

    Args:
      name: what reports call it; errors begin with it.
      loss: `loss(params, batch)`, a scalar.
      optimizer: any optax transformation; its state begins anew with every task, unless `start` gives one.
      adapt: makes the tree to train from `params` and a key.
      memory: makes the first memory from the adapted tree; none is kept if None.
      start: returns the state with what a new task changes, `start(state, task, key)`; the key is its own. Where it
        leaves `opt_state` None, the optimizer's state begins anew.
      end: returns the state with what is kept of a task, `end(state, task, batches)`.
      update: turns gradients into updates; the optimizer's own if None.
      penalty: of the whole tree, added to the loss and reported beside it.
      tasks: number of tasks there is room for; no limit if None.
      plan: see `Learner.plan`; its result is the fourth argument of `start`. None where shapes stay.

    Returns:
      The learner. Calls out of order are refused with `StreamError`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: jnp.sum((batch @ params["w"].value) ** 2)
      >>> learner = make_learner(
      ...     "demo", loss, optax.sgd(0.1), adapt=lambda params, key: sj.adapt(params, {"w": sj.full()}, key=key)
      ... )
      >>> state = learner.init({"w": jnp.ones((2, 1))}, jax.random.key(0))
      >>> learner.step(learner.start_task(state, 0, jax.random.key(1)), jnp.eye(2), jax.random.key(2))[1]
      {'loss': Array(2., dtype=float32)}
    """

    def init(params: Params, key: jax.Array) -> LearnerState:
        adapted = adapt(params, key)
        return initial_state(adapted, None if memory is None else memory(adapted))

    find_plan = plan

    def start_task(state: LearnerState, task: int, key: jax.Array, plan: Any = None) -> LearnerState:
        check_start(name, state, task, tasks)
        if start is not None and find_plan is not None:
            state = start(state, task, key, find_plan(state, task) if plan is None else plan)
        elif start is not None:
            state = start(state, task, key)
        if state.opt_state is None:
            state = state._replace(opt_state=init_opt_state(optimizer, state.adapted))
        return state

    def end_task(state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        check_end(name, state, task)
        return end_state(state if end is None else end(state, task, batches))

    step = make_step(loss, update or plain_update(optimizer), penalty)
    return Learner(name, init, start_task, step, end_task, adapted_of, plan)
