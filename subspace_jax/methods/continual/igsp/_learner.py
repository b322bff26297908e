"""iGSP as a learner: a task grows the pool, its routers tell what of that is needed, the rest is trained alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_jax.continual import Learner, LearnerState, Loss, Selector, StreamError, make_learner, rules_of
from subspace_jax.core import (
    Batch,
    Params,
    Role,
    adapt,
    check_int,
    check_number,
    combine,
    is_tracer,
    key_for,
    map_with_paths,
    partition,
    with_adapters,
    with_dropout,
)
from subspace_jax.methods.continual.igsp._method import igsp
from subspace_jax.methods.continual.igsp._pool import (
    PoolMemory,
    averaged,
    expand,
    init_memory,
    learning,
    old_columns,
    outside,
    settle,
)
from subspace_jax.methods.continual.igsp._routing import price_at, subspace_penalty
from subspace_jax.methods.continual.igsp._trees import map_pools, pools
from subspace_jax.methods.continual.igsp._weight import ExpertPool


def learner(
    loss: Loss,
    select: Selector | Iterable[str],
    optimizer: optax.GradientTransformation,
    *,
    tasks: int,
    steps: int,
    size: int = 64,
    candidates: int = 2,
    price: float | jax.Array = 1.5,
    keep: float = 0.5,
    keep_history: float = 0.0,
    first_phase: float = 0.4,
    decay: float = 0.95,
    orth_residual: bool = False,
    rules: Any = None,
    roles: Mapping[str, Role] | None = None,
    **options: Any,
) -> Learner:
    r"""Returns a learner that keeps old experts and routers as they are, and adds experts where a task needs them.

    A task begins with `candidates` new experts in every pool and a router of its own. In the first phase all experts
    are used, and the router's probability of new ones costs \(\beta\) (`price_at`): what old experts can do is left to
    them. Then new experts whose mean probability is below \(\kappa\) of a uniform share go (`prune`), moments begin
    anew, and the others are trained without that price. One program does all steps of all tasks.

    Outputs for an earlier task are what they were, exactly, if its router is asked: `at_task(params, task)`, by
    number or by `select_task`. The state's own tree is at the last task.

    Args:
      loss: `loss(params, batch)`, a scalar; call the model by `with_adapters`, or not. Label smoothing 0.2 is usual.
      select: globs or a predicate of path and array: the kernels that pools stand on, and with `reads` those whose
        input they read.
      optimizer: any optax transformation, AdamW; its state, schedules too, begins anew with every phase.
      tasks: number of tasks.
      steps: of a task, both phases together.
      size: \(r\), hidden values of an expert.
      candidates: \(N_c\).
      price: \(\beta\) at the end of its ramp, 0.5 to 2; none in the first task.
      keep: \(\kappa\) for new experts.
      keep_history: likewise for old ones, which this task's router leaves out below it.
      first_phase: share of the steps.
      decay: of the moving mean of probabilities.
      orth_residual: new experts read, in the second phase, only directions of inputs that old ones do not.
      rules: what else learns, as rules of `adapt`, without a mask. What is shared by tasks would forget.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.
      **options: of `igsp`: `reads`, `token`, `top`, `scale`, `noise`, `dropout`, `dtype`.

    Returns:
      A learner whose memory is a `PoolMemory` by path. Metrics: "loss", "penalty" (the mean probability of new
      experts), "price", "experts" in use.

    Raises:
      StreamError: from `start_task`: no room for another task.
      RankError: a number of something is not a positive integer, or there are fewer than two steps.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> igsp = sj.methods.igsp
      >>> loss = lambda params, batch: jnp.mean((batch @ params["w"] - 2.0) ** 2)
      >>> learner = igsp.learner(loss, "w", optax.adam(0.05), tasks=2, steps=4, size=2)
      >>> state = learner.init({"w": jnp.eye(3)}, jax.random.key(0))
      >>> state = learner.start_task(state, 0, jax.random.key(1))
      >>> step = jax.jit(learner.step)
      >>> for i in range(4):
      ...     state, metrics = step(state, jnp.eye(3), jax.random.key(i))
      >>> state = learner.end_task(state, 0, [])
      >>> igsp.kept_experts(learner.params(state))["w"].tolist()
      [2, 0]
    """
    steps = check_int("igsp.learner: steps", steps, least=2)
    for name, value in (("price", price), ("keep", keep), ("keep_history", keep_history)):
        check_number(f"igsp.learner: {name}", value, least=0.0)
    check_number("igsp.learner: first_phase", first_phase, above=0.0, below=1.0)
    check_number("igsp.learner: decay", decay, least=0.0, below=1.0)
    switch = min(max(round(first_phase * steps), 1), steps - 1)
    method = igsp(size, tasks=tasks, candidates=candidates, **options)
    run = with_adapters(loss, collect=True)

    def start(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        memory = dict(state.memory)
        for path, pool in pools(state.adapted).items():
            if orth_residual and task:
                columns = memory[path].basis.shape[-1]
                memory[path] = memory[path]._replace(basis=old_columns(pool, task, columns, path))
        grown = map_pools(state.adapted, lambda path, pool: expand(pool, task, candidates, key_for(key, path)))
        return state._replace(adapted=grown, memory=memory)

    def end(state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        del batches
        done = steps if is_tracer(state.steps) else int(state.steps)
        if done <= switch:
            raise StreamError(
                f"igsp: task {task} ends after {done} steps, and its experts are chosen after {switch} of the "
                f"{steps} that steps= names. Make the learner with the steps= that tasks have."
            )
        return state

    def settled(adapted: Params, memory: Mapping[str, PoolMemory]) -> tuple[Params, Any]:
        tree = map_pools(adapted, lambda path, pool: settle(pool, memory[path], keep, keep_history, orth_residual))
        return tree, optimizer.init(partition(tree)[0])

    def step(state: LearnerState, batch: Batch, key: jax.Array) -> tuple[LearnerState, dict[str, jax.Array]]:
        if state.opt_state is None:
            raise StreamError("step: no task is running. Begin one: state = learner.start_task(state, task, key).")
        adapted, opt_state = jax.lax.cond(
            state.steps == switch,
            lambda: settled(state.adapted, state.memory),
            lambda: (state.adapted, state.opt_state),
        )
        known = pools(adapted)
        beta = price_at(state.steps, switch, price) * ((state.steps < switch) & (state.task > 0))
        trainable, frozen = partition(adapted)

        def objective(trainable: Params) -> tuple[jax.Array, Any]:
            value, reports = run(with_dropout(combine(trainable, frozen), key), batch)
            new = _mass_of_new(reports, known)
            metrics = {"loss": value.astype(jnp.float32), "penalty": new, "price": beta}
            return value + (beta * new).astype(value.dtype), (metrics, reports)

        gradients, (metrics, reports) = jax.grad(objective, has_aux=True)(trainable)
        complement = (state.steps >= switch) & (state.task > 0) if orth_residual else None
        gradients = _restricted(gradients, known, state.memory, complement)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        trainable = optax.apply_updates(trainable, _restricted(updates, known, state.memory, None))
        if complement is not None:
            trainable = _projected(trainable, known, state.memory, complement)
        first = state.steps == 0
        memory = {
            path: one._replace(pi=averaged(one.pi, _mean_of(reports[path], known[path]), first, decay))
            for path, one in state.memory.items()
        }
        used = [jnp.sum(jnp.any(pool.active > 0, axis=-2)) for pool in known.values()]
        metrics["experts"] = jnp.sum(jnp.stack(used)).astype(jnp.float32)
        new_state = state._replace(
            steps=state.steps + 1, adapted=combine(trainable, frozen), opt_state=opt_state, memory=memory
        )
        return new_state, metrics

    made = make_learner(
        "igsp",
        loss,
        optimizer,
        adapt=lambda params, key: adapt(params, rules_of(select, method, rules), key=key, roles=roles),
        memory=lambda adapted: {path: init_memory(pool, orth_residual) for path, pool in pools(adapted).items()},
        start=start,
        end=end,
        tasks=tasks,
    )
    return made._replace(step=step)


def _rows(report: Any) -> jax.Array:
    """Probabilities of one pool; of one that is used in several places, together."""
    if not isinstance(report, list):
        return report
    return jnp.concatenate([one.reshape(-1, one.shape[-1]) for one in report])


def _mean_of(report: Any, pool: ExpertPool) -> jax.Array:
    """Mean probabilities `[*stack, experts]`; a loop over layers has put the stack in front."""
    p, stack = _rows(report), pool.candidates.shape[:-1]
    return jnp.mean(p.reshape(*stack, -1, p.shape[-1]), axis=-2)


def _mass_of_new(reports: Mapping[str, Any], known: Mapping[str, ExpertPool]) -> jax.Array:
    """The penalty, a mean over layers: a sum would cost more in a deeper model."""
    pairs = [(_mean_of(reports[path], pool), pool.candidates) for path, pool in known.items()]
    p, new = (jnp.concatenate([v.reshape(-1, v.shape[-1]) for v in side]) for side in zip(*pairs, strict=True))
    return subspace_penalty(p, new)


def _on_pools(tree: Params, known: Mapping[str, ExpertPool], change: Callable[[str, ExpertPool], ExpertPool]) -> Params:
    return map_with_paths(lambda path, leaf: change(path, leaf) if path in known else leaf, tree)


def _restricted(
    values: Params, known: Mapping[str, ExpertPool], memory: Mapping[str, PoolMemory], complement: Any
) -> Params:
    values = _on_pools(values, known, lambda path, one: learning(known[path], one))
    return values if complement is None else _projected(values, known, memory, complement)


def _projected(
    values: Params, known: Mapping[str, ExpertPool], memory: Mapping[str, PoolMemory], complement: jax.Array
) -> Params:
    """What new experts read, without what old ones do."""

    def change(path: str, one: ExpertPool) -> ExpertPool:
        mask = complement & (known[path].candidates > 0)
        down = jnp.where(mask[..., None, None], outside(one.down, memory[path].basis), one.down)
        return dataclasses.replace(one, down=down)

    return _on_pools(values, known, change)
