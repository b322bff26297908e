"""Trains one method: steps, evaluations, checkpoints, early stopping; resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import subspace_jax as sj
from subspace_jax.io import Checkpointer
from subspace_jax.training import TrainState, fit, init_train_state, make_train_step

from ._errors import UserError
from ._evaluate import Evaluation, evaluate_model
from ._examples import Examples
from ._methods import adapt_model, find_adapter
from ._options import FinetuneOptions
from ._problem import Problem
from ._schedule import make_schedule


class Job:
    """One method on one problem, compiled.

    Args:
      problem: model and labels.
      options: of the run.
      method: name of the method.
      rules: what it does to which leaf.
      train: examples to learn from.
      validation: examples to judge by.
      dtype: of the computation.

    Attributes:
      steps: optimizer steps in all.
      rate: peak learning rate.
    """

    def __init__(
        self,
        problem: Problem,
        options: FinetuneOptions,
        method: str,
        rules: dict[str, Any],
        train: Examples,
        validation: Examples,
        dtype: Any,
    ) -> None:
        self.problem, self.options, self.train, self.validation = problem, options, train, validation
        seen = train.epochs(options.batch // options.accumulate, options.seed)
        self.adapted = adapt_model(problem.params, rules, options.seed, problem.roles, _plain_loss(problem), seen)
        self.rate = options.learning_rate or find_adapter(method).rate
        per_epoch = train.steps(options.batch)
        self.steps = options.steps or max(1, math.ceil(options.epochs * per_epoch))
        self.every = min(options.evaluate_every or per_epoch, self.steps)
        self.schedule = make_schedule(options, self.rate, self.steps)
        # One long text must not undo what the others taught.
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(self.schedule, weight_decay=options.weight_decay)
        )
        loss = sj.with_adapters(_plain_loss(problem))
        self._step = make_train_step(
            lambda adapted, batch, key: loss(adapted, batch),
            self._optimizer,
            accumulate=options.accumulate,
            weight=problem.count,
        )
        self._compiled: Any = None
        self._compute = None if dtype == np.float32 else dtype

    def start(self) -> TrainState:
        """Returns the state before the first step."""
        key = jax.random.key(2000 + self.options.seed)
        return init_train_state(self.adapted, self._optimizer, key, compute_dtype=self._compute)

    def compile(self, state: TrainState) -> dict[str, float]:
        """Compiles the step, takes one of each kind on a copy, and returns what the run will take.

        Returns:
          `memory_bytes` at the highest, `seconds` in all, and `step_seconds`.
        """
        batch = self.train.take(np.arange(min(len(self.train), self.options.batch)), self.options.batch)
        began = time.perf_counter()
        compiled = self._step.lower(state, batch).compile()
        self._compiled = compiled
        copy = jax.tree.map(jax.numpy.copy, state._replace(frozen=None))._replace(frozen=state.frozen)
        held = resident_bytes()
        copy, _ = self._take(copy, batch)  # warms caches and allocator
        compiling = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(self._take(copy, batch)[1])
        step = time.perf_counter() - began
        evaluations = 1 + math.ceil(self.steps / self.every)
        # An evaluation runs the forward pass, a third of a step's work, on every validation row.
        judging = evaluations * len(self.validation) / self.options.batch * step / 3
        analysis = compiled.memory_analysis()
        memory = held + float(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
        return {"memory_bytes": memory, "seconds": compiling + self.steps * step + judging, "step_seconds": step}

    def _take(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = self._compiled(state._replace(frozen=None), state.frozen, batch)
        return new._replace(frozen=state.frozen), metrics

    def _batches(self, start: int) -> Any:
        return self.train.epochs(self.options.batch, self.options.seed, start)

    def evaluate(self, adapted: Any, examples: Examples | None = None) -> Evaluation:
        """Returns what the parameters reach on the validation examples, or on others."""
        micro = self.options.batch // self.options.accumulate
        return evaluate_model(self.problem, adapted, examples or self.validation, micro)

    def run(self, state: TrainState, folder: Path, on_step: Any, on_evaluation: Any) -> Result:
        """Trains to the end, or to where early stopping or SIGTERM ends it; goes on from the folder's checkpoint.

        Args:
          state: from `start`; `compile` was called.
          folder: of the run.
          on_step: called with number, loss and rate.
          on_evaluation: called with number and metrics.

        Raises:
          UserError: the loss is not finite any more.
        """
        log = _Log(folder / "steps.jsonl")
        with (
            Checkpointer(folder / "checkpoints", max_to_keep=1, base=self.problem.params) as checkpointer,
            Checkpointer(folder / "best", max_to_keep=1, base=self.problem.params) as best,
        ):
            state, evaluations = _restored(state, checkpointer)
            log.cut(int(state.step))
            stopped = False
            while int(state.step) < self.steps and not stopped and not _patience_over(evaluations, self.options):
                target = min(self.steps, (int(state.step) // self.every + 1) * self.every)

                def note(number: int, metrics: dict[str, jax.Array]) -> None:
                    loss = float(metrics["loss"])
                    rate = float(np.asarray(self.schedule(number - 1)))
                    log.add({"step": number, "loss": loss, "rate": rate, "norm": float(metrics["gradient_norm"])})
                    if not math.isfinite(loss):
                        raise UserError(
                            f"step {number}: the loss is {loss}. Lower --learning-rate (it was {self.rate:g}), or "
                            "compute in --dtype float32."
                        )
                    on_step(number, loss, rate)

                state = fit(state, self._take, self._batches, steps=target, on_metrics=note)
                stopped = int(state.step) < target
                adapted = sj.combine(state.trainable, state.frozen)
                if not stopped:
                    metrics = self.evaluate(adapted).metrics
                    number = int(state.step)
                    if all(metrics["loss"] < one["loss"] for one in evaluations):
                        best.save(number, adapted)
                    evaluations.append({"step": number, **metrics})
                    on_evaluation(number, metrics)
                log.write()
                extra = {"key": state.key, "evaluations": evaluations}
                checkpointer.save(int(state.step), adapted, opt_state=state.opt_state, extra=extra)
            if stopped:
                return Result(None, evaluations, int(state.step))
            return Result(best.restore().adapted, evaluations, int(state.step))


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
      adapted: the parameters with the lowest validation loss; None of a run that was told to stop.
      evaluations: step and metrics of each.
      step: the last one taken.
    """

    adapted: Any
    evaluations: list[dict[str, float]]
    step: int

    @property
    def best(self) -> dict[str, float]:
        """The evaluation with the lowest validation loss, the first of equal ones."""
        return min(self.evaluations, key=lambda one: one["loss"])


def _plain_loss(problem: Problem) -> Any:
    def loss(params: Any, batch: Any) -> jax.Array:
        total, count = problem.sums(params, batch)
        return total / jax.numpy.maximum(count, 1.0)

    return loss


class _Log:
    """Lines of a run's steps, written at checkpoints; what a killed run wrote after its last one is cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: list[str] = []

    def cut(self, step: int) -> None:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, entry: dict[str, Any]) -> None:
        self._new.append(json.dumps(entry))

    def write(self) -> None:
        with self._path.open("a") as file:
            file.writelines(f"{line}\n" for line in self._new)
        self._new = []


def _restored(state: TrainState, checkpointer: Checkpointer) -> tuple[TrainState, list[dict[str, float]]]:
    if checkpointer.latest_step() is None:
        return state, []
    found = checkpointer.restore(like=state.opt_state)
    trainable, frozen = sj.partition(found.adapted)
    step = jax.numpy.asarray(found.step, state.step.dtype)
    restored = TrainState(step, trainable, frozen, found.opt_state, found.extra["key"])
    return restored, list(found.extra["evaluations"])


def _patience_over(evaluations: list[dict[str, float]], options: FinetuneOptions) -> bool:
    if options.patience is None or not evaluations:
        return False
    losses = [one["loss"] for one in evaluations]
    return len(losses) - 1 - losses.index(min(losses)) >= options.patience


def resident_bytes() -> float:
    """Returns the memory of this process at its highest so far; on an accelerator that of the device."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would begin with what the process held that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
