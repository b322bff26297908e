"""O-LoRA as a learner: a new adapter for every task, kept orthogonal to those of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from subspace_jax.continual import Learner, LearnerState, Loss, Selector, check_tasks, make_learner, rules_of
from subspace_jax.core import Method, Role, adapt
from subspace_jax.methods.continual.o_lora._method import next_task, o_lora, penalty


def learner(
    loss: Loss,
    select: Selector | Iterable[str],
    optimizer: optax.GradientTransformation,
    *,
    tasks: int,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.0,
    overlap_weight: float = 0.5,
    norm_weight: float = 0.0,
    within: Callable[[Method], Method] | None = None,
    rules: Any = None,
    roles: Mapping[str, Role] | None = None,
) -> Learner:
    """Returns a learner that trains a new low-rank adapter for every task, orthogonal to earlier ones (O-LoRA).

    When a task starts, the factors that the last one trained are frozen beside those of earlier tasks, and new ones
    take their place; see `o_lora.next_task`. The metrics of a step have `o_lora.penalty` beside the loss.

    Args:
      loss: `loss(params, batch)`, a scalar; call the model by `with_adapters`.
      select: globs or a predicate of path and array: the kernels that get adapters.
      optimizer: any optax transformation; its state begins anew with every task.
      tasks: number of tasks in the stream.
      rank: of each task's adapter.
      alpha: an adapter is scaled by alpha / rank.
      dropout: probability of dropping an input of the adapter that learns; published: 0.1.
      overlap_weight: weight of the overlap with earlier tasks' input sides.
      norm_weight: weight of the factors' norms.
      within: changes the adapters' method, such as `lambda m: sj.methods.comp_lora.confine(m, protect=4)`, which keeps
        every task's adapter out of the weights' principal directions.
      rules: what else learns, heads for instance, as rules of `adapt`.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Raises:
      StreamError: `tasks` is not a positive integer.
      RankError: `rank` is not a positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
      >>> learner = sj.methods.o_lora.learner(loss, "w", optax.sgd(0.1), tasks=2, rank=1)
      >>> state = learner.init({"w": jnp.ones((3, 2))}, jax.random.key(0))
      >>> state = learner.start_task(state, 0, jax.random.key(1))
      >>> state, metrics = learner.step(state, jnp.eye(3), jax.random.key(2))
      >>> sorted(metrics), state.adapted["w"].base.a.shape
      (['loss', 'penalty'], (3, 1))
    """
    check_tasks("o_lora.learner", tasks)
    # The task that runs has a pair of its own, so that room is needed for those before the last.
    method = o_lora(rank, tasks=max(tasks - 1, 1), alpha=alpha, dropout=dropout)
    method = method if within is None else within(method)

    def start(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        return state._replace(adapted=next_task(state.adapted, task - 1, key=key)) if task else state

    return make_learner(
        "o_lora",
        loss,
        optimizer,
        adapt=lambda params, key: adapt(params, rules_of(select, method, rules), key=key, roles=roles),
        start=start,
        penalty=lambda whole: penalty(whole, overlap_weight, norm_weight),
        tasks=tasks,
    )
