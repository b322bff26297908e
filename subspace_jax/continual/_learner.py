"""The interface of a learner of a stream of tasks: pure functions around one step that is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from subspace_jax.core import (
    Batch,
    Method,
    OptState,
    Params,
    PyTree,
    SubspaceError,
    Updates,
    combine,
    partition,
    with_dropout,
)

Loss = Callable[[Any, Any], jax.Array]
Selector = str | Callable[[str, Any], bool]


class StreamError(SubspaceError):
    """A learner or a stream is used out of order, beyond its capacity, or before its end."""


class LearnerState(NamedTuple):
    """State of a learner: arrays and trees of arrays.

    Between tasks their shapes are always the same, and within tasks too, but for learners with a `plan`.

    Attributes:
      task: int32 scalar, number of the task that runs, from zero; between tasks that of the next one.
      steps: int32 scalar, steps taken in this task.
      adapted: the parameters, with stand-in weights; what evaluation runs with.
      opt_state: the optimizer's state; None between tasks, so that a step there is refused when it is traced.
      memory: what the learner keeps of earlier tasks, in a form of its own.
    """

    task: jax.Array
    steps: jax.Array
    adapted: Any
    opt_state: Any
    memory: Any


class Init(Protocol):
    """Makes the first state."""

    def __call__(self, params: Params, key: jax.Array) -> LearnerState:
        """Returns the state before the first task; it shares no array with `params`, and `key` is consumed."""
        ...


class StartTask(Protocol):
    """Begins a task."""

    def __call__(self, state: LearnerState, task: int, key: jax.Array, plan: Any = None) -> LearnerState:
        """Returns the state with fresh moments; `task` counts from zero and `key` is consumed.

        `plan` is what `Learner.plan` found for the task; a learner with plans finds it itself if None.
        """
        ...


class Step(Protocol):
    """Learns from one batch."""

    def __call__(self, state: LearnerState, batch: Batch, key: jax.Array) -> tuple[LearnerState, dict[str, jax.Array]]:
        """Returns the state after one optimizer step, and float32 scalars; `key` draws dropout."""
        ...


class EndTask(Protocol):
    """Ends a task."""

    def __call__(self, state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        """Returns the state with what is to be kept of the task; `batches` of it are read only where needed."""
        ...


class Learner(NamedTuple):
    """A continual learner: pure functions, as an optax transformation is.

    The order is `init`, then for every task `start_task`, steps, `end_task`; anything else is refused. Compile the
    step with `jax.jit(learner.step, donate_argnums=0)`: one program serves all tasks. The other functions run between
    tasks, as they are. `run_stream` does all of that.

    The loss is the caller's, `loss(params, batch)`, and gets the whole tree, in which heads of all tasks exist from
    the start. Where it reads the head of the batch's own task alone, that head alone learns: moments begin anew with
    every task, so that a gradient of zero leaves the others as they are (weight decay would not).

    Attributes:
      name: what reports call it.
      init: makes the first state.
      start_task: begins a task.
      step: learns from one batch.
      end_task: ends a task.
      params: of a state, the tree to evaluate with, through `with_adapters`.
      plan: None where the state has the same shapes in every task. Else `plan(state, task)` gives, before a task, what
        its shapes depend on, as Python ints and lists by path: tasks of other plans may compile again, and a checkpoint
        within a task holds the plan, from which `start_task` makes a state of the same shapes.
    """

    name: str
    init: Init
    start_task: StartTask
    step: Step
    end_task: EndTask
    params: Callable[[LearnerState], Any]
    plan: Callable[[LearnerState, int], Any] | None = None


class Update(Protocol):
    """How a learner turns gradients into updates."""

    def __call__(
        self, gradients: Updates, state: LearnerState, trainable: Params, frozen: Params
    ) -> tuple[Updates, OptState]:
        """Returns updates and the optimizer's state; the last two arguments are those of `partition`."""
        ...


def initial_state(adapted: Params, memory: PyTree = None) -> LearnerState:
    """Returns the state before the first task; every array is a copy, since steps may free what they are given."""
    state = LearnerState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), adapted, None, memory)
    return jax.tree.map(jnp.copy, state)


def init_opt_state(optimizer: optax.GradientTransformation, adapted: Params) -> OptState:
    """Initializes an optimizer for the trainable tree, in arrays that share nothing with it.

    Args:
      optimizer: any optax transformation.
      adapted: the whole adapted tree, of which what learns counts.
    """
    return jax.tree.map(jnp.copy, optimizer.init(partition(adapted)[0]))


def end_state(state: LearnerState, **changed: Any) -> LearnerState:
    """Advances a state past the end of a task: the next number, no steps, no optimizer state."""
    state = state._replace(task=state.task + 1, steps=jnp.zeros_like(state.steps), opt_state=None)
    return state._replace(**changed)


def make_step(loss: Loss, update: Update, penalty: Callable[[Params], jax.Array] | None = None) -> Step:
    """Returns the step of a learner.

    Args:
      loss: of the whole tree and a batch, a scalar.
      update: turns gradients into updates.
      penalty: of the whole tree, added to the loss and reported beside it.
    """

    def step(state: LearnerState, batch: Batch, key: jax.Array) -> tuple[LearnerState, dict[str, jax.Array]]:
        if state.opt_state is None:
            raise StreamError("step: no task is running. Begin one: state = learner.start_task(state, task, key).")
        trainable, frozen = partition(state.adapted)

        def objective(trainable: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            whole = combine(trainable, frozen)
            value = loss(with_dropout(whole, key), batch)
            metrics = {"loss": value.astype(jnp.float32)}
            if penalty is not None:
                metrics["penalty"] = penalty(whole)
                value = value + metrics["penalty"].astype(value.dtype)
            return value, metrics

        gradients, metrics = jax.grad(objective, has_aux=True)(trainable)
        updates, opt_state = update(gradients, state, trainable, frozen)
        adapted = combine(optax.apply_updates(trainable, updates), frozen)
        return state._replace(steps=state.steps + 1, adapted=adapted, opt_state=opt_state), metrics

    return step


def check_start(name: str, state: LearnerState, task: int, tasks: int | None = None) -> None:
    """Refuses to begin a task while another one runs, out of turn, or beyond the number that there is room for."""
    if state.opt_state is not None:
        raise StreamError(
            f"{name}: start_task({task}) while task {concrete_int(state.task)} is running; end that one first with "
            "end_task(state, task, batches)."
        )
    _check_number(name, "start_task", state, task)
    if tasks is not None and task >= tasks:
        raise StreamError(
            f"{name}: start_task({task}), but there is room for {tasks} tasks, 0 to {tasks - 1}. Make the learner with "
            "tasks= of the whole stream: its arrays do not grow."
        )


def check_end(name: str, state: LearnerState, task: int) -> None:
    """Refuses to end a task that is not running."""
    if state.opt_state is None:
        raise StreamError(
            f"{name}: end_task({task}), but no task is running: {concrete_int(state.task)} have ended. A task ends "
            "once, after start_task(state, task, key)."
        )
    _check_number(name, "end_task", state, task)


def _check_number(name: str, what: str, state: LearnerState, task: int) -> None:
    if isinstance(task, bool) or not isinstance(task, int):
        raise StreamError(f"{name}: {what} got task={task!r}; expected the number of the task, a Python int from zero.")
    expected = concrete_int(state.task)
    if expected is not None and task != expected:
        raise StreamError(f"{name}: {what}({task}), but it is the turn of task {expected}; tasks count from zero.")


def concrete_int(value: jax.Array) -> int | None:
    """Returns an integer scalar's value, or None under a trace."""
    return None if isinstance(value, (Tracer, jax.ShapeDtypeStruct)) else int(value)


def rules_of(select: Selector | Iterable[str], method: Method, rules: Any) -> list[tuple[Selector, Method | None]]:
    """Returns rules for `adapt`: one method for what is selected, then the caller's for everything else.

    Args:
      select: globs or a predicate of path and array.
      method: of what they select.
      rules: the caller's, as those of `adapt`; None for none.
    """
    selectors: list[Any] = [select] if isinstance(select, str) or callable(select) else list(select)
    others = rules.items() if isinstance(rules, Mapping) else rules or ()
    return [*((one, method) for one in selectors), *others]


def check_tasks(name: str, tasks: Any) -> None:
    """Refuses a number of tasks that is not a positive integer.

    Args:
      name: what errors begin with.
      tasks: what the caller gave.

    Raises:
      StreamError: `tasks` is not a positive integer.
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
        raise StreamError(f"{name}: tasks={tasks!r}; expected the number of tasks in the stream, a positive int.")


def adapted_of(state: LearnerState) -> Params:
    """Returns the parameters of a state: what `Learner.params` is."""
    return state.adapted
