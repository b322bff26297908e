"""Runs of the league: one arm on one task, tuned, trained, saved, loaded, judged, and what a step of it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, read_json, widened, write_json
from experiments.tasks.league._arms import ARMS, Arm
from experiments.tasks.league._budget import find_budget
from experiments.tasks.league._job import Job
from experiments.tasks.training import Trainer, warmup_linear

# Training batches from which methods that start from statistics take theirs.
CALIBRATION = 4


def part_file(folder: Path, task: str, method: str, steps: int, part: str) -> Path:
    """Returns where a finished part of a run is kept."""
    return folder / "cells" / f"{task}-{method}-{steps}-{part}.json"


def unpack(record: Mapping[str, Any], folder: Path, steps: Mapping[str, int]) -> None:
    """Writes what a record holds as finished parts, so that a run with `--resume` goes on from it.

    Args:
      record: a result of the league, of some tasks and methods.
      folder: of the run.
      steps: of the tasks whose settings are the record's.
    """
    parts = [(one, f"tuning-{one['learning_rate']:g}-{one['seed']}") for one in record["tuning"]]
    parts += [(one, f"{one['learning_rate']:g}-{one['seed']}") for one in record["cells"]]
    parts += [(one, "costs") for one in record["costs"]]
    for one, part in parts:
        if one["task"] in steps:
            path = part_file(folder, one["task"], one["method"], steps[one["task"]], part)
            if not path.exists():
                write_json(path, {name: value for name, value in one.items() if name != "arm"})


class Entrant:
    """One arm on one task: adapted trees by seed, and one compiled step for all rates and seeds.

    Args:
      name: of the arm.
      job: the task.
      context: where files go, and whether finished ones are kept.
    """

    def __init__(self, name: str, job: Job, context: Context) -> None:
        self.name, self._job, self._context, self._arm = name, job, context, ARMS[name]
        self._trainer: Trainer | None = None
        self._made: dict[int, tuple[Any, Any, float]] = {}

    def tune(self, seed: int) -> list[dict[str, Any]]:
        """Returns validation accuracy at learning rates among which the best lies inside."""
        found: list[dict[str, Any]] = []

        def score(rate: float) -> float:
            found.append(self._kept(f"tuning-{rate:g}-{seed}", lambda: self._tuning_run(rate, seed)))
            return found[-1]["accuracy"]

        widened((self._arm.rate,), score)
        return found

    def cell(self, rate: float, seed: int) -> dict[str, Any]:
        """Returns what one run with one seed came to."""
        return self._kept(f"{rate:g}-{seed}", lambda: self._test_run(rate, seed))

    def costs(self, baseline: Entrant, rounds: int) -> dict[str, Any]:
        """Returns operations, bytes and seconds of a step, in turns with the baseline's."""
        return self._kept("costs", lambda: self._measure(baseline, rounds))

    def timed_step(self) -> Any:
        """Returns a function that takes one step and returns its seconds."""
        _, adapted, _ = self._adapt(0)
        return self._compiled(adapted).timed_step(adapted, next(self._job.batches(0)))

    def _kept(self, part: str, make: Any) -> dict[str, Any]:
        """What is in the part's file, or what is made now and written there."""
        path = part_file(self._context.folder, self._job.name, self.name, self._job.steps, part)
        if not (self._context.resume and path.exists()):
            write_json(path, {"task": self._job.name, "method": self.name, **make()})
        return read_json(path)

    def _adapt(self, seed: int) -> tuple[Any, Any, float]:
        """Parameters with a fresh head, the adapted tree, and the seconds that it took."""
        if seed not in self._made:
            self._made = {seed: _adapted(self._arm, self._job, seed)}  # one at a time: some are as large as the model
        return self._made[seed]

    def _compiled(self, adapted: Any) -> Trainer:
        """The trainer of the first tree, whose structure all seeds share."""
        if self._trainer is None:
            self._trainer = Trainer(self._job.loss, _optimizer(self._arm, self._job.steps, adapted))
        return self._trainer

    def _train(self, adapted: Any, rate: float, seed: int, title: str) -> Any:
        trainer, job = self._compiled(adapted), self._job
        with self._context.progress() as progress:
            bar = progress.add_task(f"{job.name}, {self.name}, {title}", total=job.steps, note="compiling")

            def on_step(loss: float, seconds: float) -> None:
                progress.update(bar, advance=1, note=f"loss {loss:.2f} {1000 * seconds:.0f} ms")

            return trainer.run(adapted, job.batches(seed), on_step, rate=rate)

    def _tuning_run(self, rate: float, seed: int) -> dict[str, Any]:
        trained = self._train(self._adapt(seed)[1], rate, seed, f"rate {rate:g}")
        found = {"learning_rate": rate, "seed": seed}
        try:
            merged = sj.merge(trained.adapted)
        except sj.errors.NonFiniteError:
            return {**found, "accuracy": 0.0, "last_loss": None}  # it diverged, so this rate is too large
        last = float(np.mean(trained.losses[-5:]))
        return {**found, "accuracy": self._job.accuracy(merged, "validation"), "last_loss": last}

    def _test_run(self, rate: float, seed: int) -> dict[str, Any]:
        """Trains, saves, loads, merges, and judges what was loaded."""
        params, adapted, start_seconds = self._adapt(seed)
        trained = self._train(adapted, rate, seed, f"seed {seed}")
        saved = self._context.folder / "cells" / f"{self._job.name}-{self.name}.safetensors"
        sj.save_adapter(saved, _as_lora(trained.adapted, params), base=params)
        merged = sj.merge(sj.load_adapter(saved, params))
        found = {
            "learning_rate": rate,
            "seed": seed,
            "accuracy": self._job.accuracy(merged, "test"),
            "retained": self._job.retained(merged),
            "trainable": sj.summary(trained.adapted).trainable,
            "start_seconds": start_seconds,
            "state_bytes": trained.state_bytes,
            "saved_bytes": saved.stat().st_size,
            "merged_difference": self._difference(trained.adapted, merged, saved),
            "last_loss": float(np.mean(trained.losses[-5:])),
        }
        saved.unlink()
        return found

    def _difference(self, adapted: Any, merged: Any, saved: Path) -> float:
        """How far the loaded and merged weights are from the trained ones, in the outputs of one batch."""
        batch = next(self._job.batches(0))
        logits = np.asarray(jax.jit(sj.with_adapters(self._job.model))(adapted, batch))
        difference = float(np.abs(np.asarray(jax.jit(self._job.model)(merged, batch)) - logits).max())
        if difference > 2e-3 * max(1.0, float(np.abs(logits).max())):
            raise RuntimeError(f"{saved.stem}: saved, loaded and merged, logits differ by {difference:.2e}.")
        return difference

    def _measure(self, baseline: Entrant, rounds: int) -> dict[str, Any]:
        mine, theirs = self.timed_step(), baseline.timed_step()
        seconds = [(mine(), theirs()) for _ in range(rounds)]
        assert self._trainer is not None  # by the timed step
        trainer = self._trainer
        return {
            "step_flops": trainer.flops,
            "memory_bytes": trainer.memory_bytes,
            "step_seconds": float(np.median([a for a, _ in seconds])),
            "time_ratio": float(np.median([a / b for a, b in seconds])),
        }


def _optimizer(arm: Arm, steps: int, adapted: Any) -> optax.GradientTransformation:
    """The arm's optimizer with its peak rate in the state, so that another rate compiles nothing."""
    shape = warmup_linear(1.0, steps)

    def made(rate: Any) -> optax.GradientTransformation:
        def schedule(count: Any) -> Any:
            return rate * shape(count)

        if arm.optimizer is None:
            return optax.adamw(schedule, weight_decay=0.0)
        return arm.optimizer(schedule, steps, adapted)

    return optax.inject_hyperparams(made)(rate=arm.rate)


def _adapted(arm: Arm, job: Job, seed: int) -> tuple[Any, Any, float]:
    params = job.start(seed)
    batches = [batch for batch, _ in zip(job.batches(seed), range(CALIBRATION), strict=False)]
    roles = sj.roles(job.model, params, batches[0])  # one abstract trace; biases and norms of ssf need it
    sizes = find_budget(job.kernels, params, roles)
    started = time.perf_counter()
    stats = None
    if arm.needs is not None:
        fn = job.model if arm.needs == "gram" else job.loss
        stats = sj.capture(fn, params, batches, statistics=arm.needs, select=job.kernels)  # pyright: ignore[reportArgumentType]
    rules: Mapping[Any, Any] = arm.rules(job, sizes) if arm.rules_of is None else arm.rules_of(stats, roles, sizes)
    adapted = sj.adapt(params, {**job.head, **rules}, key=jax.random.key(1000 + seed), stats=stats, roles=roles)
    return params, jax.block_until_ready(adapted), time.perf_counter() - started


def _as_lora(adapted: Any, params: Any) -> Any:
    """The tree with residual low-rank weights as LoRA on the untouched arrays, which is smaller in a file."""
    try:
        return sj.to_lora(adapted, params)
    except sj.errors.StructureError:  # the method's weights are of another kind
        return adapted
