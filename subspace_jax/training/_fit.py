"""The training loop: resume, step, report, save, stop in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from subspace_jax.core import Batch, PyTree, StructureError, combine, partition, path_string, put
from subspace_jax.io import Checkpointer
from subspace_jax.training._preemption import Preemption
from subspace_jax.training._state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def fit(
    state: TrainState,
    step: Step,
    batches: Callable[[int], Iterable[Batch]],
    *,
    steps: int,
    checkpointer: Checkpointer | None = None,
    every: int | None = None,
    save_frozen: bool = True,
    on_metrics: Callable[[int, dict[str, jax.Array]], None] | None = None,
) -> TrainState:
    """Trains for `steps` steps in all, counting those of runs that it resumes.

    With a checkpointer the run resumes from its latest checkpoint, and saves every `every` steps, at the end, and when
    it is told to stop: at SIGTERM the running step is finished and saved, and `fit` returns early, on all processes
    after the same step. A run that was killed resumes bit-identically, if `batches` gives the same batches.

    Args:
      state: from `init_train_state`. When a run resumes, arrays of the checkpoint are placed as its arrays are.
      step: from `make_train_step`.
      batches: `batches(n)`, the batches from the n-th on, counted from 0; see `shard_batch`.
      steps: how many steps the run has in all.
      checkpointer: open, and closed by the caller. Where it has `base=`, what equals the base is not saved.
      every: steps between checkpoints; None saves at the end only.
      save_frozen: False saves what learns alone, for a base that is too large to write often. The caller then answers
        for the same frozen arrays at every start.
      on_metrics: called with the number of every step taken and its metrics; reading a number waits for the step.

    Returns:
      The last state; `state.step` is below `steps` if the run was stopped.

    Raises:
      ValueError: `steps` is negative or `every` not positive, or the batches end too early; what was learned is saved
        first.
      StructureError: the checkpoint is of another tree.
      CheckpointError: the checkpoint is damaged, or its optimizer is another one.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, numpy as np, optax, subspace_jax as sj
      >>> from subspace_jax.training import init_train_state, make_train_step
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> optimizer, apply = optax.adam(1e-2), sj.with_adapters(lambda params, x: x @ params["w"])
      >>> step = make_train_step(lambda p, x, key: jnp.mean(apply(p, x) ** 2), optimizer)
      >>> def batches(start):
      ...     for number in range(start, 100):
      ...         yield np.random.default_rng(number).normal(size=(8, 6)).astype(np.float32)
      >>> with sj.io.Checkpointer(tempfile.mkdtemp()) as checkpointer:
      ...     state = init_train_state(adapted, optimizer, jax.random.key(1))
      ...     state = fit(state, step, batches, steps=4, checkpointer=checkpointer, every=2)
      ...     checkpointer.all_steps()
      [2, 4]
    """
    if steps < 0 or (every is not None and every < 1):
        raise ValueError(f"fit: steps={steps}, every={every}; expected steps >= 0, and every >= 1 or None.")
    if checkpointer is not None and checkpointer.latest_step() is not None:
        state = _restored(state, checkpointer)
    saved = number = int(state.step)

    def save() -> None:
        nonlocal saved
        if checkpointer is not None and number > saved:
            tree = combine(state.trainable, state.frozen) if save_frozen else state.trainable
            checkpointer.save(number, tree, opt_state=state.opt_state, extra={"key": state.key})
            saved = number

    try:
        with Preemption() as preemption:
            source = iter(batches(number)) if number < steps else iter(())
            while number < steps:
                try:
                    batch = next(source)
                except StopIteration:
                    save()
                    raise ValueError(
                        f"fit: the batches ended after step {number} of {steps}. batches(n) gives those from the n-th "
                        "on, of all epochs."
                    ) from None
                state, metrics = step(state, batch)
                number += 1
                if on_metrics is not None:
                    on_metrics(number, metrics)
                stop = preemption.due(number)
                if stop or number == steps or (every is not None and number % every == 0):
                    save()
                if stop:
                    break
    finally:
        if checkpointer is not None:
            checkpointer.wait()
    return state


def _restored(state: TrainState, checkpointer: Checkpointer) -> TrainState:
    """The state of the latest checkpoint, every array where that of `state` is."""
    whole = combine(state.trainable, state.frozen)
    saved = _paths(checkpointer.abstract().adapted)
    with_frozen = not saved.keys() <= _paths(state.trainable).keys()
    tree = whole if with_frozen else state.trainable
    if saved != (expected := _paths(tree)):
        path = sorted(p for p in {*saved, *expected} if saved.get(p) != expected.get(p))[0]
        raise StructureError(
            f"{path}: fit: the checkpoint in {checkpointer.directory} has {saved.get(path, 'nothing')} here, the state "
            f"{expected.get(path, 'nothing')}. Start with the model, the rules and the dtypes of the run that saved "
            "it, or with another folder."
        )
    found = checkpointer.restore(like=state.opt_state, shardings=jax.tree.map(_place, tree))
    trainable, frozen = partition(found.adapted)
    step, key = jnp.asarray(found.step, state.step.dtype), found.extra["key"]
    if (place := _place(state.step)) is not None:
        step, key = put(step, place), put(key, place)
    return TrainState(step, trainable, frozen if with_frozen else state.frozen, found.opt_state, key)


def _paths(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every array by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): f"{value.dtype}{list(value.shape)}" for path, value in leaves}


def _place(value: Any) -> Any:
    """The sharding of an array that was placed explicitly; None for others."""
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
