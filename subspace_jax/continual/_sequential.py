"""The two baselines of continual learning: sequential training, which forgets, and joint training, the ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from subspace_jax.continual._learner import Learner, LearnerState, Loss, init_opt_state
from subspace_jax.continual._make_learner import make_learner
from subspace_jax.core import Batch, Role, adapt


def sequential_learner(
    loss: Loss, rules: Any, optimizer: optax.GradientTransformation, *, roles: Mapping[str, Role] | None = None
) -> Learner:
    """Returns a learner that trains on one task after the other without any measure against forgetting.

    With `{"**": sj.full()}` it is sequential fine-tuning, with `sj.lora` sequential LoRA, whose one adapter learns all
    tasks; any other method of adaptation fits.

    Args:
      loss: `loss(params, batch)`, a scalar; `params` may hold stand-in weights, so call the model by `with_adapters`.
      rules: what learns and how, as rules of `adapt`; the same in all tasks.
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

    return make_learner(
        "sequential", loss, optimizer, adapt=lambda params, key: adapt(params, rules, key=key, roles=roles)
    )


def joint_learner(
    loss: Loss, rules: Any, optimizer: optax.GradientTransformation, *, roles: Mapping[str, Role] | None = None
) -> Learner:
    """Returns a learner that ignores the boundaries of tasks: joint training, the ceiling, on examples of all tasks.

    Its stream has as many tasks as that of the others and the batches of each are drawn from all of them: equal
    steps, and a row of the accuracy matrix after every share of them.

    Args:
      loss: `loss(params, batch)`, a scalar; call the model by `with_adapters`.
      rules: what learns and how, as rules of `adapt`.
      optimizer: any optax transformation; its state goes on through all tasks, so that a schedule spans the stream.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

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

    def start(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        del task, key
        return state._replace(opt_state=state.memory, memory=None)

    def end(state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        del task, batches
        return state._replace(memory=state.opt_state)

    return make_learner(
        "joint",
        loss,
        optimizer,
        adapt=lambda params, key: adapt(params, rules, key=key, roles=roles),
        memory=lambda adapted: init_opt_state(optimizer, adapted),
        start=start,
        end=end,
    )
