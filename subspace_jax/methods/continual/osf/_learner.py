"""OSF as a learner: before every task the weights are split anew, and more of each is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.continual import (
    Learner,
    LearnerState,
    Loss,
    Selector,
    StreamError,
    check_tasks,
    init_opt_state,
    make_learner,
    rules_of,
)
from subspace_jax.core import (
    Batch,
    OptState,
    Params,
    Role,
    Updates,
    adapt,
    check_choice,
    leaves_with_paths,
    merge,
    partition,
    select_paths,
)
from subspace_jax.methods.continual.osf._frozen import removers
from subspace_jax.methods.continual.osf._method import osf, ranks_of
from subspace_jax.methods.continual.osf._ranks import importance, ranks, schedule
from subspace_jax.methods.continual.osf._transform import OSFState, projection


def learner(
    loss: Loss,
    select: Selector | Iterable[str],
    optimizer: optax.GradientTransformation,
    *,
    tasks: int,
    preserved: str | Callable[[int], Any] = "schedule",
    floor: float = 0.1,
    target: float = 0.8,
    width: Literal["common", "bucketed"] = "common",
    project_gradients: bool = True,
    rules: Any = None,
    roles: Mapping[str, Role] | None = None,
) -> Learner:
    r"""Returns a learner that trains every task orthogonal to the large singular directions of the weights (OSF).

    When a task starts, every selected kernel is split by its singular values, see `osf`; the part of the large ones is
    frozen, and what learns stays orthogonal to it, see `osf.projection`. When the task ends, the kernels are merged.

    Operations of a step beside full fine-tuning of the same kernels, as compiled for four of width 512 with 30 % of
    the triples frozen: with 1,024 rows 2.3 at the common width, 1.8 bucketed, 1.6 bucketed with updates projected
    alone; with 128 rows 8.5, 5.4 and 3.8 (`python -m benchmarks run projected_step`). They fall as more is frozen, and
    with whatever else a model multiplies.

    Args:
      loss: `loss(params, batch)`, a scalar; call the model by `with_adapters`.
      select: globs or a predicate of path and array: the kernels to split.
      optimizer: any optax transformation, AdamW in the paper; its state begins anew with every task.
      tasks: number of tasks in the stream.
      preserved: how much to freeze. "schedule": the share \(t / T\) of the singular values before task \(t\), from
        zero. "importance": by layer, the policy of the paper, from batches of the task before (`osf.importance`,
        `osf.ranks`); nothing before the first task. Or a function of the number of the task, from zero, whose result
        is what `osf` takes.
      floor: least share of a layer's singular values that "importance" freezes.
      target: share that "importance" freezes of a layer of mean importance.
      width: "common" gives the factors room for every rank, so that one program serves the stream, and multiplies their
        zeros. "bucketed" rounds ranks up to multiples of an eighth: far fewer operations, and a task compiles again
        where a rank is in another eighth than before.
      project_gradients: whether gradients are projected beside parameters. Without, what is frozen stays as it is too,
        for fewer operations; the optimizer's moments are those of the whole gradient. On the stream of the experiment
        `osf` both end alike: 78.0 ± 0.8 % with, 78.6 ± 0.6 without; likewise in `continual_text`, 37.7 ± 7.1 and
        41.3 ± 4.6. In `continual_vision` it is worse: 46.8 ± 6.0 and 28.9 ± 6.9.
      rules: what else learns, heads for instance, as rules of `adapt`.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Returns:
      A learner whose parameters are ordinary arrays between tasks. Its memory is the importance by path, or None; only
      with "importance" does `end_task` read batches.

    Raises:
      StreamError: `tasks` is not a positive integer, or `preserved` is not a policy.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
      >>> learner = sj.methods.osf.learner(loss, "w", optax.adam(0.1), tasks=2)
      >>> state = learner.init({"w": jnp.diag(jnp.array([2.0, 1.0]))}, jax.random.key(0))
      >>> for task in range(2):
      ...     state = learner.start_task(state, task, jax.random.key(1))
      ...     before = jnp.linalg.svd(sj.merge(learner.params(state))["w"])
      ...     state, _ = learner.step(state, jnp.eye(2), jax.random.key(2))
      ...     state = learner.end_task(state, task, [])
      >>> jnp.allclose(before[0][:, 0] @ learner.params(state)["w"], before[1][0] * before[2][0], atol=1e-6).item()
      True
    """
    check_tasks("osf.learner", tasks)
    if not callable(preserved) and preserved not in ("schedule", "importance"):
        raise StreamError(
            f'osf.learner: preserved={preserved!r}; expected "schedule", "importance" or a function of the task.'
        )

    check_choice("osf.learner: width", width, ("common", "bucketed"))

    programs: dict[Any, Any] = {}  # compiled once, not at the end of every task

    def split(params: Params, share: Any, key: jax.Array) -> Params:
        method = osf(share, width=width)
        return adapt(params, rules_of(select, method, rules), key=key, roles=roles)

    def share_of(state: LearnerState, task: int) -> Any:
        if callable(preserved):
            return preserved(task)
        if preserved == "schedule":
            return schedule(task + 1, tasks)
        found = {path: np.asarray(value) for path, value in state.memory.items()}
        return ranks(found, state.adapted, floor=floor, target=target, roles=roles) if task else 0

    def unsplit(params: Params, key: jax.Array) -> Params:
        jax.eval_shape(lambda p: split(p, 0, key), params)  # refuses bad patterns and shapes now
        return params

    def weights(params: Params) -> dict[str, Any]:
        """The selected weights by path, abstract."""
        split_params = jax.eval_shape(lambda p: split(p, 0, jax.random.key(0)), params)
        chosen = set(select_paths(params, select))
        return {path: weight for path, weight in leaves_with_paths(split_params) if path in chosen}

    def no_importance(params: Params) -> Any:
        if preserved != "importance":
            return None
        return {path: jnp.zeros(w.role.stack_shape(w.shape)) for path, w in weights(params).items()}

    def plan(state: LearnerState, task: int) -> dict[str, Any]:
        share = share_of(state, task)
        return {
            path: ranks_of(share[path] if isinstance(share, Mapping) else share, weight.role, weight.shape).tolist()
            for path, weight in weights(state.adapted).items()
        }

    def start(state: LearnerState, task: int, key: jax.Array, planned: Mapping[str, Any] | None = None) -> LearnerState:
        share = share_of(state, task) if planned is None else {p: np.asarray(r) for p, r in planned.items()}
        adapted = split(state.adapted, share, key)
        held = OSFState(removers(partition(adapted)[1]), init_opt_state(optimizer, adapted))
        # Singular vectors held as they are belong to the frozen tree, and a donated step would free them twice.
        return state._replace(adapted=adapted, opt_state=jax.tree.map(jnp.copy, held))

    def end(state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        del task
        params = merge(state.adapted)
        if preserved != "importance":
            return state._replace(adapted=params)
        known = {path: w.role for path, w in leaves_with_paths(state.adapted) if path in state.memory}
        found = importance(loss, params, batches, select=list(known), roles=known, programs=programs)
        return state._replace(adapted=params, memory={p: jnp.asarray(v, jnp.float32) for p, v in found.items()})

    def update(gradients: Updates, state: LearnerState, trainable: Params, frozen: Params) -> tuple[Updates, OptState]:
        del frozen
        held = projection(optimizer, state.opt_state.high, project_gradients=project_gradients)
        return held.update(gradients, state.opt_state, trainable)

    return make_learner(
        "osf",
        loss,
        optimizer,
        adapt=unsplit,
        memory=no_importance,
        start=start,
        end=end,
        update=update,
        tasks=tasks,
        plan=plan if width == "bucketed" else None,
    )
