"""Streams of tasks for one backbone with a head for each task: what the continual experiments share.

Every method sees the same tasks in the same order, the same examples, and the same number of steps; the learning rate
of each is the best of three on the validation split of a shorter stream, with a seed that is used for nothing else.
Heads learn at a rate of their own, the same for all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, human_bytes, mean_and_spread, read_json, with_spread, write_json
from experiments.tasks.training import evaluate, warmup_linear

HEADS = {"heads/*": sj.full()}
SCORES = ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy")
TUNING_SEED = 100


@dataclasses.dataclass(frozen=True)
class StreamData:
    """Tasks with what learns them.

    Attributes:
      names: of the tasks.
      batches: `batches(task, split, size, seed, epoch)` yields batches of an epoch as dicts of arrays with `labels`.
      model: `model(params, batch)` gives logits; `batch["task"]` says for each example whose head is meant.
      start: makes the parameters of a seed: `backbone`, and `heads` of all tasks.
      kernels: glob of the kernels that methods adapt or project.
      rows: tells which rows of a batch are not padding; None where all are inputs.
      roles: how the model uses kernels with more than two axes.
      test_model: gives the logits of evaluation; those of `model` if None.
      joint_labels: gives, of a batch, the labels that joint training compares with the logits of `test_model`; None
        where it is trained as the others are.
    """

    names: tuple[str, ...]
    batches: Callable[[int, str, int, int, int], Iterator[dict[str, np.ndarray]]]
    model: Callable[[Any, Any], jax.Array]
    start: Callable[[int], Any]
    kernels: str
    rows: Callable[[Any], jax.Array] | None = None
    roles: Mapping[str, sj.Role] | None = None
    test_model: Callable[[Any, Any], jax.Array] | None = None
    joint_labels: Callable[[Any], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Settings of a stream.

    Attributes:
      methods: of METHODS; all of them if empty.
      seeds: one order of tasks and one run of every method per seed.
      tuning_tasks: length of the streams by which rates are chosen.
      steps: optimizer steps of each task.
      batch_size: examples of a step.
      head_rate: peak learning rate of the heads.
      rank: of each LoRA, and of each task's O-LoRA.
      threshold: share of the inputs' energy that GPM keeps.
      columns: share of the input dimensions that GPM has room for.
      preserved: what OSF freezes before each task: "schedule" or "importance".
      r1: rank of CoSO's subspaces.
      r2: rank of CoSO's sketches.
      gap: steps from one of CoSO's subspaces to the next.
      calibration: batches of a task that are read at its end by GPM, and by OSF for importance.
      rounds: steps by which costs are measured, of every method in turn.
      checkpoints: save every stream after each task, so that `--resume` continues inside a stream.
    """

    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_tasks: int = 3
    steps: int = 32
    batch_size: int = 16
    head_rate: float = 1e-2
    rank: int = 8
    threshold: float = 0.9
    columns: float = 0.5
    preserved: str = "schedule"
    r1: int = 16
    r2: int = 32
    gap: int = 20
    calibration: int = 8
    rounds: int = 10
    checkpoints: bool = False


def _loss(data: StreamData, joint: bool = False) -> Callable[[Any, Any], jax.Array]:
    whole = data.test_model if joint and data.joint_labels else None
    apply = sj.with_adapters(whole or data.model)

    def loss(params: Any, batch: Any) -> jax.Array:
        labels = data.joint_labels(batch) if whole and data.joint_labels else batch["labels"]
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch), labels).mean()

    return loss


def _optimizer(rate: float, config: StreamConfig, tasks: int = 1) -> optax.GradientTransformation:
    """Adam with a warm-up and a linear decay over the steps of so many tasks, heads at their own rate."""

    def labels(tree: Any) -> Any:
        is_head = lambda path, leaf: "heads" if path[0].key == "heads" else "others"  # noqa: E731
        return jax.tree_util.tree_map_with_path(is_head, tree, is_leaf=sj.core.is_weight)

    adam: dict[Any, Any] = {"heads": _adam(config.head_rate, config, tasks), "others": _adam(rate, config, tasks)}
    return optax.multi_transform(adam, labels)


def _adam(rate: float, config: StreamConfig, tasks: int = 1) -> optax.GradientTransformation:
    return optax.adam(warmup_linear(rate, tasks * config.steps))


def _others(data: StreamData) -> dict[str, Any]:
    return {"rules": HEADS, "roles": data.roles}


def _full(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    return sj.continual.sequential_learner(_loss(data), {"**": sj.full()}, _optimizer(rate, config), roles=data.roles)


def _lora(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    rules = {data.kernels: sj.lora(config.rank, alpha=2.0 * config.rank), **HEADS}
    return sj.continual.sequential_learner(_loss(data), rules, _optimizer(rate, config), roles=data.roles)


def _o_lora(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    options: dict[str, Any] = {"rank": config.rank, "alpha": 2.0 * config.rank, "tasks": len(data.names)}
    return sj.methods.o_lora.learner(_loss(data), data.kernels, _optimizer(rate, config), **_others(data), **options)


def _gpm(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    options: dict[str, Any] = {"threshold": config.threshold, "columns": config.columns, "mask": data.rows}
    return sj.methods.gpm.learner(_loss(data), data.kernels, _optimizer(rate, config), **_others(data), **options)


def _osf(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    options: dict[str, Any] = {"tasks": len(data.names), "preserved": config.preserved}
    return sj.methods.osf.learner(_loss(data), data.kernels, _optimizer(rate, config), **_others(data), **options)


def _coso(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    schedule = warmup_linear(rate, config.steps)
    optimizer = sj.coso(schedule, config.r1, config.r2, config.gap, tasks=len(data.names))
    heads = _adam(config.head_rate, config)
    return sj.methods.coso.learner(_loss(data), data.kernels, optimizer, rules_optimizer=heads, **_others(data))


def _joint(data: StreamData, rate: float, config: StreamConfig) -> sj.continual.Learner:
    return sj.continual.joint_learner(
        _loss(data, joint=True), {"**": sj.full()}, _optimizer(rate, config, len(data.names)), roles=data.roles
    )


# Each with the three learning rates that it is tried with.
METHODS: dict[
    str, tuple[Callable[[StreamData, float, StreamConfig], sj.continual.Learner], tuple[float, float, float]]
] = {
    "full": (_full, (3e-5, 1e-4, 3e-4)),
    "lora": (_lora, (3e-4, 1e-3, 3e-3)),
    "o_lora": (_o_lora, (3e-4, 1e-3, 3e-3)),
    "gpm": (_gpm, (1e-4, 3e-4, 1e-3)),
    "osf": (_osf, (3e-5, 1e-4, 3e-4)),
    "coso": (_coso, (3e-4, 1e-3, 3e-3)),
    "joint": (_joint, (3e-5, 1e-4, 3e-4)),
}
TITLES = {
    "full": "sequential full fine-tuning",
    "lora": "sequential LoRA",
    "o_lora": "O-LoRA",
    "gpm": "GPM",
    "osf": "OSF",
    "coso": "CoSO",
    "joint": "joint training (ceiling)",
}


class Streams:
    """Runs the methods on the streams of one set of tasks; learners are compiled once and kept."""

    def __init__(self, data: StreamData, config: StreamConfig, context: Context) -> None:
        unknown = sorted(set(config.methods) - set(METHODS))
        if unknown:
            raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}.")
        self.data, self.config, self.context = data, config, context
        self.methods = config.methods or tuple(METHODS)
        self._learners: dict[tuple[str, float], sj.continual.Learner] = {}
        # Merged parameters have one structure, so that one program evaluates all methods.
        self._logits = jax.jit(data.test_model or data.model)

    def run(self) -> dict[str, Any]:
        """Returns every cell, and what a step of each method costs."""
        tuning, runs = [], []
        for method in self.methods:
            found = [self._cell(method, rate, TUNING_SEED, "validation") for rate in METHODS[method][1]]
            best = max(found, key=lambda cell: cell["last"])
            tuning += found
            runs += [self._cell(method, best["learning_rate"], seed, "test") for seed in self.config.seeds]
        rates = {cell["method"]: cell["learning_rate"] for cell in runs}
        return {"tasks": list(self.data.names), "tuning": tuning, "runs": runs, "costs": self._costs(rates)}

    def learner(self, method: str, rate: float) -> sj.continual.Learner:
        """Returns the learner of a method, made once."""
        if (method, rate) not in self._learners:
            self._learners[method, rate] = METHODS[method][0](self.data, rate, self.config)
        return self._learners[method, rate]

    def _cell(self, method: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        """One stream, from disk if it is there and `--resume` was given."""
        folder = self.context.folder / "cells"
        folder.mkdir(exist_ok=True)
        name = f"{method}-{rate:g}-{seed}-{split}-{self._fingerprint()}"
        path = folder / f"{name}.json"
        if not (self.context.resume and path.exists()):
            write_json(path, self._stream(method, rate, seed, split, name))
        return read_json(path)

    def _fingerprint(self) -> str:
        """Names the settings that a stream depends on."""
        others = ("methods", "seeds", "rounds", "checkpoints")
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in others}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def _stream(self, method: str, rate: float, seed: int, split: str, name: str) -> dict[str, Any]:
        order = np.random.default_rng(seed).permutation(len(self.data.names)).tolist()
        order = order[: self.config.tuning_tasks] if split == "validation" else order
        seconds: list[float] = []
        losses: list[float] = []
        title = f"{method} {rate:g} {'tuning' if split == 'validation' else f'seed {seed}'}"
        with self.context.progress() as progress:
            bar = progress.add_task(title, total=len(order) * self.config.steps, note="")
            clock = time.perf_counter()

            def on_step(task: int, step: int, metrics: Mapping[str, jax.Array]) -> None:
                nonlocal clock
                losses.append(float(metrics["loss"]))
                if step > 1:  # the first one waits for what starts the task, or for the compiler
                    seconds.append(time.perf_counter() - clock)
                clock = time.perf_counter()
                progress.update(bar, advance=1, note=f"task {task + 1}  loss {losses[-1]:.3f}")

            tasks = [self._task(method, place, order, seed, split) for place in range(len(order))]
            evaluated = "last" if split == "validation" else "seen"
            options: dict[str, Any] = {"key": jax.random.key(seed), "evaluate": evaluated, "on_step": on_step}
            result = self._run_stream(self.learner(method, rate), tasks, seed, name, options)
            last = float(np.mean(result.matrix[-1]))
            progress.update(bar, note=f"accuracy {100 * last:.1f}%")
        scores = {} if split == "validation" else sj.continual.stream_scores(result.matrix)._asdict()
        memory = getattr(result.state, "memory", None)
        return {
            **{"method": method, "learning_rate": rate, "seed": seed, "order": [self.data.names[i] for i in order]},
            **{"last": last, "matrix": [[None if np.isnan(v) else v for v in row] for row in result.matrix.tolist()]},
            **{"losses": losses, "mean_step_seconds": statistics.fmean(seconds), **scores},
            "kept": _kept(memory),
        }

    def _run_stream(self, learner: Any, tasks: Any, seed: int, name: str, options: dict[str, Any]) -> Any:
        params = self.data.start(seed)
        if not self.config.checkpoints:
            return sj.run_stream(learner, params, tasks, **options)
        with sj.io.Checkpointer(self.context.folder / "checkpoints" / name, max_to_keep=1, base=params) as checkpointer:
            return sj.run_stream(learner, params, tasks, checkpointer=checkpointer, **options)

    def _task(self, method: str, place: int, order: Sequence[int], seed: int, split: str) -> sj.continual.StreamTask:
        task = order[place]

        def batches(start: int) -> Iterator[Any]:
            found = self._mixed(place, order, seed) if method == "joint" else self._own(task, seed)
            for number, batch in zip(range(self.config.steps), found, strict=False):
                if number >= start:
                    yield batch

        def calibration() -> Iterator[Any]:
            return (b for _, b in zip(range(self.config.calibration), batches(0), strict=False))

        def score(params: Any) -> float:
            return evaluate(self._logits, sj.merge(params), self._held_out(task, split))[0]

        return sj.continual.StreamTask(self.data.names[task], batches, score, calibration)

    def _own(self, task: int, seed: int) -> Iterator[dict[str, Any]]:
        """Batches of one task, epoch after epoch."""
        epoch = 0
        while True:
            for batch in self.data.batches(task, "train", self.config.batch_size, seed, epoch):
                yield {**batch, "task": np.full(len(batch["labels"]), task, np.int32)}
            epoch += 1

    def _mixed(self, place: int, order: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
        """Batches with examples of all tasks, mixed from the batches that the others see one task after the other."""
        sources = [self._own(task, seed) for task in order]
        rng = np.random.default_rng([seed, place])
        skipped = place * self.config.steps // len(sources)
        for source in sources:
            for _ in range(skipped):
                next(source)
        while True:
            pool = [next(source) for source in sources]
            everything = {k: np.concatenate([b[k] for b in pool]) for k in pool[0]}
            mixed = rng.permutation(len(everything["labels"])).reshape(len(sources), -1)
            for rows in mixed:
                yield {k: v[rows] for k, v in everything.items()}

    def _held_out(self, task: int, split: str) -> Iterator[dict[str, Any]]:
        for batch in self.data.batches(task, split, 50, 0, 0):
            yield {**batch, "task": np.full(len(batch["labels"]), task, np.int32)}

    def _costs(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Bytes, operations and times of every method; steps are taken in turn, on the second task's state."""
        made = [(method, *self._timed(method, rate)) for method, rate in rates.items()]
        times: dict[str, list[float]] = {method: [] for method in rates}
        for _ in range(self.config.rounds):
            for method, step, _ in made:
                times[method].append(step())
        return [
            {
                **{"method": method, "first_seconds": times[method][0], **figures},
                "step_seconds": statistics.median(times[method][1:] or times[method]),
            }
            for method, _, figures in made
        ]

    def _timed(self, method: str, rate: float) -> tuple[Callable[[], float], dict[str, Any]]:
        """A function that takes a step and returns its seconds, and figures of the compiled step."""
        learner, key = self.learner(method, rate), jax.random.key(0)
        state = learner.init(self.data.start(0), key)
        resting = sum(v.nbytes for v in jax.tree.leaves(state))
        state = learner.start_task(state, 0, key)
        batch = jax.tree.map(jnp.asarray, next(self._own(0, 0)))
        compiled = jax.jit(learner.step, donate_argnums=0).lower(state, batch, key).compile()
        arrays = jax.tree.leaves(state)
        figures = {
            "flops": float((compiled.cost_analysis() or {}).get("flops", 0.0)),
            "state_bytes": sum(v.nbytes for v in arrays),
            "resting_bytes": resting,
            "trainable": sj.summary(learner.params(state)).trainable,
        }

        def step() -> float:
            nonlocal state
            start = time.perf_counter()
            state, metrics = compiled(state, batch, key)
            jax.block_until_ready(metrics["loss"])
            return time.perf_counter() - start

        step()  # CoSO decomposes in the first one, and whatever else warms up
        return step, figures


def _kept(memory: Any) -> dict[str, int]:
    """How many directions a learner protects by the end, by path."""
    if not isinstance(memory, dict):
        return {}
    return {path: int(np.sum(m.rank)) for path, m in memory.items() if hasattr(m, "rank")}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the table: one line per method."""
    table = [
        [
            *("method", "learning rate", "final accuracy %", "backward transfer %", "forgetting %"),
            *("accuracy when learned %", "learner's state", "step time / full", "operations / full"),
        ]
    ]
    costs = {c["method"]: c for c in results["costs"]}
    plain = costs.get("full")
    for method in costs:
        runs = [r for r in results["runs"] if r["method"] == method]
        scores = [with_spread([r[name] for r in runs]) for name in SCORES]
        if method == "joint":  # there is no time at which it learned a task
            scores[1:] = ["", "", ""]
        cost = costs[method]
        relative = [f"{cost[k] / plain[k]:.2f}" if plain else "" for k in ("step_seconds", "flops")]
        table.append(
            [TITLES[method], f"{runs[0]['learning_rate']:g}", *scores, human_bytes(cost["state_bytes"]), *relative]
        )
    return table


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws the accuracy matrix of every method, the mean over seeds, by place in the order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(r["method"] for r in results["runs"]))
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.7 * columns, 2.9 * lines), squeeze=False)
    image = None
    for axis in axes.ravel()[len(methods) :]:
        axis.axis("off")
    for axis, method in zip(axes.ravel(), methods, strict=False):
        matrices = [np.array(r["matrix"], float) for r in results["runs"] if r["method"] == method]
        mean = 100 * np.mean(matrices, axis=0)
        image = axis.imshow(mean, vmin=0, vmax=100, cmap="viridis")
        for (row, column), value in np.ndenumerate(mean):
            if np.isfinite(value):
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
        spread = mean_and_spread([r["average_accuracy"] for r in results["runs"] if r["method"] == method])
        axis.set_title(f"{TITLES[method]}\n{100 * spread[0]:.1f} ± {100 * spread[1]:.1f} %", fontsize=9)
        axis.set_xticks(range(len(mean)), range(1, len(mean) + 1))
        axis.set_yticks(range(len(mean)), range(1, len(mean) + 1))
        axis.set_xlabel("accuracy on task", fontsize=8)
        axis.set_ylabel("after training on task", fontsize=8)
    figure.tight_layout()
    if image is not None:
        figure.colorbar(image, ax=axes, label="%", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
