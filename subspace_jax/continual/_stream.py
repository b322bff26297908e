"""Runs a learner over a stream of tasks: training, evaluation, checkpoints, and resuming from one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.continual._learner import Learner, LearnerState, StreamError, concrete_int
from subspace_jax.core import OptState, Params, PyTree, Weight, is_weight, leaves_with_paths, nested_weights


class StreamTask(NamedTuple):
    """One task of a stream.

    Attributes:
      name: what reports and errors call it.
      batches: `batches(start)` yields the training batches from number `start` on, the same at every call: a stream
        that was stopped resumes in the middle of a task. All of one structure, shapes and dtypes, over all tasks.
      evaluate: `evaluate(params)` gives the score of a tree, higher is better.
      calibration: yields what `end_task` sees; all training batches if None.
    """

    name: str
    batches: Callable[[int], Iterable[Any]]
    evaluate: Callable[[Any], float]
    calibration: Callable[[], Iterable[Any]] | None = None


class StreamResult(NamedTuple):
    """The result of a stream: its accuracy matrix and the last state.

    Attributes:
      matrix: `[tasks, tasks]` float64, score on the task of the column after training on that of the row; NaN where it
        was not evaluated. `stream_scores` makes the usual numbers of it.
      base: `[tasks]` float64, scores before any training; NaN where they were not evaluated.
      state: the learner's state after the last task.
    """

    matrix: np.ndarray
    base: np.ndarray
    state: LearnerState


class StreamCheckpointer(Protocol):
    """The interface of what saves a stream: `sj.io.Checkpointer`, or anything with these methods."""

    def save(self, step: int, adapted: Params, *, opt_state: OptState = None, extra: Any = None) -> None:
        """Saves one checkpoint of the stream."""
        ...

    def restore(self, step: int | None = None, *, like: PyTree = None, shardings: PyTree = None) -> Any:
        """Returns what was saved."""
        ...

    def abstract(self, step: int | None = None) -> Any:
        """Returns what was saved, without numbers."""
        ...

    def latest_step(self) -> int | None:
        """Returns the latest step, or None."""
        ...


class _Position(NamedTuple):
    """Where a stream is: all that a checkpoint holds beside the learner's state."""

    task: int  # that runs, or comes next
    steps: int  # taken in it
    total: int  # steps taken in all tasks
    running: bool
    matrix: np.ndarray
    base: np.ndarray
    plan: Any = None  # of the running task, what its shapes depend on


def run_stream(
    learner: Learner,
    params: Params,
    tasks: Sequence[StreamTask],
    *,
    key: jax.Array,
    evaluate: Literal["seen", "all", "last"] = "seen",
    checkpointer: StreamCheckpointer | None = None,
    save_every: int | None = None,
    on_step: Callable[[int, int, dict[str, jax.Array]], None] | None = None,
    on_task: Callable[[int, np.ndarray], None] | None = None,
) -> StreamResult:
    """Trains on one task after the other, and evaluates after each.

    The step is compiled once, for all tasks and for every stream with the same learner; with a learner whose shapes
    follow a `plan`, once for every plan. Given a checkpointer, the
    stream is saved after every task and, with `save_every`, within tasks; called again with the same arguments it
    resumes bit-identically from the latest checkpoint. Every random key depends on `key`, the task and the step alone.

    Args:
      learner: such as `gpm.learner(...)`.
      params: the parameters before the first task, with the heads of all tasks; they are copied.
      tasks: in the order to learn them.
      key: a random key; it is consumed.
      evaluate: after each task "seen" tasks only, which the lower triangle of the matrix needs; "all", and once before
        any training, for forward transfer, Transfer and Average; or "last" for the last row alone.
      checkpointer: an open `sj.io.Checkpointer`, of a folder of this stream's own. With its `base=params` frozen arrays
        that never change are not saved; `max_to_keep=1` keeps the latest only.
      save_every: number of steps from one checkpoint to the next within a task; none if None.
      on_step: called with the number of the task, the number of the step in it, from one, and the step's metrics, which
        are still being computed: reading them waits.
      on_task: called with the number of the task and its row of the matrix.

    Returns:
      The accuracy matrix, the scores before any training (`base`) and the last state.

    Raises:
      StreamError: there are no tasks, `evaluate` is unknown, `save_every` is below 1, a task has no batches, or the
        checkpoint is of another stream.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> def task(wanted):
      ...     batch = {"y": jnp.array(wanted)}
      ...     score = lambda params: 1.0 - abs(float(params["w"].value) - wanted)
      ...     return sj.continual.StreamTask(str(wanted), lambda start: [batch] * (5 - start), score)
      >>> loss = lambda params, batch: jnp.square(sj.with_adapters(lambda p: p["w"] - batch["y"])(params))
      >>> learner = sj.continual.sequential_learner(loss, {"w": sj.full()}, optax.sgd(0.5))
      >>> result = sj.run_stream(learner, {"w": jnp.zeros(())}, [task(1.0), task(3.0)], key=jax.random.key(0))
      >>> result.matrix.tolist()
      [[1.0, nan], [-1.0, 1.0]]
    """
    _check(tasks, evaluate, save_every)
    row = functools.partial(_evaluated, tasks, evaluate)
    start = None if checkpointer is None else _restore(checkpointer, learner, params, tasks, key)
    if start is None:
        state, position = learner.init(params, _key(key, 0, 0)), _first(len(tasks))
        if evaluate == "all":
            position = position._replace(base=row(learner.params(state), None))
    else:
        state, position = start
    step = jax.jit(learner.step, donate_argnums=0)

    def save(state: LearnerState, position: _Position) -> None:
        if checkpointer is not None:
            _save(checkpointer, state, position, learner, tasks, key)

    while position.task < len(tasks):
        number, task = position.task, tasks[position.task]
        if not position.running:
            plan = None if learner.plan is None else learner.plan(state, number)
            state = _started(learner, state, number, _key(key, number + 1, 0), plan)
            position = position._replace(running=True, steps=0, plan=plan)
        for batch in task.batches(position.steps):
            position = position._replace(steps=position.steps + 1, total=position.total + 1)
            state, metrics = step(state, batch, _key(key, number + 1, position.steps))
            if on_step is not None:
                on_step(number, position.steps, metrics)
            if save_every is not None and position.steps % save_every == 0:
                save(state, position)
        if not position.steps:
            raise StreamError(f"task {number}, {task.name!r}: batches(0) yields nothing; expected training batches.")
        state = learner.end_task(state, number, (task.calibration or functools.partial(task.batches, 0))())
        position.matrix[number] = row(learner.params(state), number)
        if on_task is not None:
            on_task(number, position.matrix[number].copy())
        position = position._replace(task=number + 1, steps=0, running=False, plan=None)
        save(state, position)
    return StreamResult(position.matrix, position.base, state)


def _check(tasks: Sequence[StreamTask], evaluate: str, save_every: int | None) -> None:
    if not tasks:
        raise StreamError("run_stream: there are no tasks.")
    if evaluate not in ("seen", "all", "last"):
        raise StreamError(f'run_stream: evaluate={evaluate!r} is "seen", "all" or "last".')
    if save_every is not None and save_every < 1:
        raise StreamError(f"run_stream: save_every={save_every}; expected a positive number of steps, or None.")


def _first(count: int) -> _Position:
    return _Position(0, 0, 0, False, np.full((count, count), np.nan), np.full(count, np.nan))


def _started(learner: Learner, state: LearnerState, task: int, key: jax.Array, plan: Any) -> LearnerState:
    """The state of a task that begins."""
    return learner.start_task(state, task, key) if plan is None else learner.start_task(state, task, key, plan)


def _key(key: jax.Array, task: int, step: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, task), step)


def _evaluated(tasks: Sequence[StreamTask], evaluate: str, params: Params, number: int | None) -> np.ndarray:
    """Scores of the tasks that are due after the given one; None is before any training."""
    last = len(tasks) - 1
    seen = -1 if number is None or evaluate == "last" else number
    due = last if evaluate == "all" or number == last else seen
    return np.array([task.evaluate(params) if i <= due else np.nan for i, task in enumerate(tasks)], np.float64)


def _identity(learner: Learner, tasks: Sequence[StreamTask], key: jax.Array) -> dict[str, Any]:
    """What a checkpoint and the stream that resumes from it must have in common."""
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return {"learner": learner.name, "tasks": [task.name for task in tasks], "key": words}


def _arrays(state: LearnerState) -> dict[str, Any]:
    """Everything of a state but the adapted tree."""
    return {name: value for name, value in state._asdict().items() if name != "adapted"}


def _save(
    checkpointer: StreamCheckpointer,
    state: LearnerState,
    position: _Position,
    learner: Learner,
    tasks: Sequence[StreamTask],
    key: jax.Array,
) -> None:
    extra = {"stream": _identity(learner, tasks, key), "position": position._asdict()}
    # The end of a task counts as a step of its own, since its last step may have been saved too.
    number = position.total + position.task
    checkpointer.save(number, state.adapted, opt_state=_arrays(state), extra=extra)


def _restore(
    checkpointer: StreamCheckpointer, learner: Learner, params: Params, tasks: Sequence[StreamTask], key: jax.Array
) -> tuple[LearnerState, _Position] | None:
    """The state and position of the latest checkpoint; None if there is none."""
    number = checkpointer.latest_step()
    if number is None:
        return None
    extra = checkpointer.abstract(number).extra
    identity = _identity(learner, tasks, key)
    found = extra.get("stream") if isinstance(extra, dict) else None
    if found != identity:
        raise StreamError(
            f"run_stream: checkpoint {number} is of the stream {found}, and this one is {identity}. Give every "
            "stream a folder of its own, or the arguments that it was begun with."
        )
    like = learner.init(params, _key(key, 0, 0))
    if extra["position"]["running"]:
        plan = extra["position"].get("plan")
        task = 0 if plan is None else extra["position"]["task"]  # without a plan all tasks have the same shapes
        like = _started(learner, like._replace(task=jnp.full_like(like.task, task)), task, _key(key, 1, 0), plan)
    restored = checkpointer.restore(number, like=_arrays(like), shardings=_shardings(like.adapted))
    same = jax.tree.structure(restored.adapted) == jax.tree.structure(like.adapted)
    if not same or _settings(restored.adapted) != _settings(like.adapted):
        raise StreamError(
            f"run_stream: the parameters of checkpoint {number} have another structure than those that the learner "
            f"{learner.name!r} makes. Was it made with other rules or ranks?"
        )
    # What the checkpointer's base gave back is its own, and the first step would free it.
    state = jax.tree.map(jnp.copy, LearnerState(adapted=restored.adapted, **restored.opt_state))
    position = _Position(**restored.extra["position"])
    if concrete_int(state.task) != position.task:
        raise StreamError(
            f"run_stream: checkpoint {number} is of task {concrete_int(state.task)} and of {position.task}."
        )
    # NumPy arrays of a file may be read-only.
    return state, position._replace(matrix=np.array(position.matrix), base=np.array(position.base))


def _settings(tree: PyTree) -> list[tuple[str, str, dict[str, float]]]:
    """What a weight's structure does not tell: its method, and scales, by path."""

    def numbers(weight: Weight) -> dict[str, float]:
        names = (n for n in weight.number_names() if n not in weight.trainable)
        return {n: float(v) for n in names if (v := getattr(weight, n)) is not None}

    weights = (nested_weights(leaf, path) for path, leaf in leaves_with_paths(tree) if is_weight(leaf))
    return [(path, weight.method, numbers(weight)) for found in weights for path, weight in found.items()]


def _shardings(tree: PyTree) -> PyTree:
    """Where arrays were placed on purpose; None elsewhere."""
    return jax.tree.map(lambda v: v.sharding if getattr(v, "committed", False) else None, tree)
