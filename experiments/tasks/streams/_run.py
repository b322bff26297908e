"""Runs the methods on the streams of one set of tasks; every finished stream is a file of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from experiments.runner import Context, best_runs, read_json, widened, write_json
from experiments.tasks.streams._batches import mixed, own
from experiments.tasks.streams._costs import costs
from experiments.tasks.streams._data import StreamConfig, StreamData
from experiments.tasks.streams._learners import METHODS
from experiments.tasks.streams._score import Scorer


class Streams:
    """Runs the methods on the streams of one set of tasks; learners are compiled once and kept.

    Args:
      data: tasks and model.
      config: settings.
      context: where the files go.

    Raises:
      SystemExit: an unknown method.
    """

    def __init__(self, data: StreamData, config: StreamConfig, context: Context) -> None:
        unknown = sorted(set(config.methods) - set(METHODS))
        if unknown:
            raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}.")
        self.data, self.config, self.context = data, config, context
        self.methods = config.methods or tuple(METHODS)
        self._learners: dict[tuple[str, float], sj.continual.Learner] = {}
        # Merged parameters have one structure, so that one program evaluates all methods.
        self._logits = jax.jit(lambda params, batch: data.logits(params, batch).reshape(len(batch["labels"]), -1))

    def run(self) -> dict[str, Any]:
        """Returns every stream, and what a step of each method costs."""
        tuning, runs, rates = [], [], {}
        for method in self.methods:
            tuning += self._tuned(method)
            rates[method] = best_runs(tuning, "accuracy")[method][0]["learning_rate"]
            runs += [self._cell(method, rates[method], seed, "test") for seed in self.config.seeds]
        spent = costs(self.data, self.config, {(m, r): self.learner(m, r) for m, r in rates.items()})
        return {"tasks": list(self.data.names), "tuning": tuning, "runs": runs, "costs": spent}

    def learner(self, method: str, rate: float) -> sj.continual.Learner:
        """Returns the learner of a method, made once."""
        if (method, rate) not in self._learners:
            self._learners[method, rate] = METHODS[method][0](self.data, rate, self.config)
        return self._learners[method, rate]

    def _tuned(self, method: str) -> list[dict[str, Any]]:
        """The short streams of a method at rates among which the best lies inside."""
        cells: list[dict[str, Any]] = []

        def score(rate: float) -> float:
            found = [self._cell(method, rate, seed, "validation") for seed in self.config.tuning_seeds]
            cells.extend(found)
            return statistics.fmean(cell["accuracy"] for cell in found)

        widened(METHODS[method][1], score)
        return cells

    def _cell(self, method: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        """One stream, from disk if it is there and `--resume` was given."""
        folder = self.context.folder / "cells"
        folder.mkdir(exist_ok=True)
        path = folder / f"{method}-{rate:g}-{seed}-{split}-{self._fingerprint()}.json"
        if not (self.context.resume and path.exists()):
            write_json(path, self._stream(method, rate, seed, split))
        return read_json(path)

    def _fingerprint(self) -> str:
        """Names the settings that a stream depends on."""
        others = ("methods", "seeds", "tuning_seeds", "rounds")
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in others}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def _stream(self, method: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        order = np.random.default_rng(seed).permutation(len(self.data.names)).tolist()
        order = order[: self.config.tuning_tasks] if split == "validation" else order
        scorer = Scorer(self.data, self._logits, order, split)
        seconds: list[float] = []
        losses: list[float] = []
        title = f"{method} {rate:g} {'tuning' if split == 'validation' else 'seed'} {seed}"
        with self.context.progress() as progress:
            bar = progress.add_task(title, total=len(order) * self.config.steps, note="")
            clock = time.perf_counter()

            def on_step(task: int, step: int, metrics: Mapping[str, jax.Array]) -> None:
                nonlocal clock
                scorer.place = task
                losses.append(float(metrics["loss"]))
                if step > 1:  # the first one waits for what starts the task, or for the compiler
                    seconds.append(time.perf_counter() - clock)
                clock = time.perf_counter()
                progress.update(bar, advance=1, note=f"task {task + 1}  loss {losses[-1]:.3f}")

            tasks = [self._task(method, place, order, seed, scorer) for place in range(len(order))]
            evaluated = "last" if split == "validation" else "seen"
            options: dict[str, Any] = {"key": jax.random.key(seed), "evaluate": evaluated, "on_step": on_step}
            result = sj.run_stream(self.learner(method, rate), self.data.start(seed), tasks, **options)
            accuracy = float(np.mean(result.matrix[-1]))
            progress.update(bar, note=f"accuracy {100 * accuracy:.1f}%")
        ends = np.reshape(losses, (len(order), -1))[:, -10:].mean(axis=1).tolist()
        return {
            **{"method": method, "learning_rate": rate, "seed": seed, "order": [self.data.names[i] for i in order]},
            **{"accuracy": accuracy, **scorer.record(), "loss_of_last_steps": ends},
            **{"mean_step_seconds": statistics.fmean(seconds), "kept": _kept(result.state.memory)},
        }

    def _task(self, method: str, place: int, order: list[int], seed: int, scorer: Scorer) -> sj.continual.StreamTask:
        config = self.config

        def batches(start: int) -> Iterator[Any]:
            if method == "joint":
                found = mixed(self.data, order, config.batch_size, seed, place, config.steps)
            else:
                found = own(self.data, order[place], config.batch_size, seed)
            for number, batch in zip(range(config.steps), found, strict=False):
                if number >= start:
                    yield batch

        def calibration() -> Iterator[Any]:
            return (b for _, b in zip(range(config.calibration), batches(0), strict=False))

        name = self.data.names[order[place]]
        return sj.continual.StreamTask(name, batches, lambda params: scorer.score(place, params), calibration)


def _kept(memory: Any) -> dict[str, int]:
    """How many directions a learner protects by the end, by path."""
    is_coso = lambda node: isinstance(node, sj.methods.coso.CosoState)  # noqa: E731
    for node in jax.tree.leaves(memory, is_leaf=is_coso):
        if is_coso(node):
            return {path: int(sj.merge(used)) for path, used in sj.core.leaves_with_paths(node.used)}
    if not isinstance(memory, dict):
        return {}
    return {path: int(np.sum(m.rank)) for path, m in memory.items() if hasattr(m, "rank")}
