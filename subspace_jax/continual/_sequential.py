"""Learning task after task without any care for earlier ones, and learning all tasks at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from subspace_jax.continual._learner import (
    Learner,
    LearnerState,
    Loss,
    adapted_of,
    check_end,
    check_start,
    end_state,
    init_opt_state,
    initial_state,
    make_step,
)
from subspace_jax.core import Role, adapt


def sequential_learner(
    loss: Loss, rules: Any, optimizer: optax.GradientTransformation, *, roles: Mapping[str, Role] | None = None
) -> Learner:
    """Returns a learner that goes on with every task from where the last one ended: the baseline that forgets.

    With `{"**": sj.full()}` it is sequential fine-tuning, with `sj.lora` sequential LoRA, whose one adapter learns all
    tasks; any other method of adaptation fits.

    Args:
      loss: `loss(params, batch)`, a scalar; `params` may hold stand-in weights, so call the model by `with_adapters`.
      rules: what learns and how, as for `adapt`; the same in all tasks.
      optimizer: any optax transformation. Its state begins anew with every task, schedules included.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
      >>> learner = sj.continual.sequential_learner(loss, {"w": sj.full()}, optax.sgd(0.1))
      >>> state = learner.init({"w": jnp.ones((2, 1))}, jax.random.key(0))
      >>> state = learner.start_task(state, 0, jax.random.key(1))
      >>> state, metrics = jax.jit(learner.step, donate_argnums=0)(state, jnp.eye(2), jax.random.key(2))
      >>> state = learner.end_task(state, 0, [])
      >>> float(metrics["loss"]), int(state.task), learner.params(state)["w"].value.tolist()
      (1.0, 1, [[0.8999999761581421], [0.8999999761581421]])
    """

    def init(params: Any, key: jax.Array) -> LearnerState:
        return initial_state(adapt(params, rules, key=key, roles=roles))

    def start_task(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        del key
        check_start("sequential_learner", state, task)
        return state._replace(opt_state=init_opt_state(optimizer, state.adapted))

    def end_task(state: LearnerState, task: int, batches: Iterable[Any]) -> LearnerState:
        del batches
        check_end("sequential_learner", state, task)
        return end_state(state)

    return Learner("sequential", init, start_task, make_step(loss, _plain(optimizer)), end_task, adapted_of)


def joint_learner(
    loss: Loss, rules: Any, optimizer: optax.GradientTransformation, *, roles: Mapping[str, Role] | None = None
) -> Learner:
    """Returns a learner for which the boundaries of tasks do not exist: the ceiling, fed with examples of all tasks.

    Its stream has as many tasks as that of the others and the batches of each are drawn from all of them: equal
    steps, and a row of the accuracy matrix after every share of them.

    Args:
      loss: as for `sequential_learner`.
      rules: as for `sequential_learner`.
      optimizer: any optax transformation; its state goes on through all tasks, so that a schedule spans the stream.
      roles: as for `sequential_learner`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
      >>> learner = sj.continual.joint_learner(loss, {"w": sj.full()}, optax.adam(0.1))
      >>> state = learner.init({"w": jnp.ones((2, 1))}, jax.random.key(0))
      >>> for task in range(2):
      ...     state = learner.start_task(state, task, jax.random.key(1))
      ...     state, _ = learner.step(state, jnp.eye(2), jax.random.key(2))
      ...     state = learner.end_task(state, task, [])
      >>> int(state.memory[0].count)
      2
    """

    def init(params: Any, key: jax.Array) -> LearnerState:
        adapted = adapt(params, rules, key=key, roles=roles)
        return initial_state(adapted, init_opt_state(optimizer, adapted))

    def start_task(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        del key
        check_start("joint_learner", state, task)
        return state._replace(opt_state=state.memory, memory=None)

    def end_task(state: LearnerState, task: int, batches: Iterable[Any]) -> LearnerState:
        del batches
        check_end("joint_learner", state, task)
        return end_state(state, memory=state.opt_state)

    return Learner("joint", init, start_task, make_step(loss, _plain(optimizer)), end_task, adapted_of)


def _plain(optimizer: optax.GradientTransformation) -> Any:
    def update(gradients: Any, state: LearnerState, trainable: Any, frozen: Any) -> tuple[Any, Any]:
        del frozen
        return optimizer.update(gradients, state.opt_state, trainable)

    return update
