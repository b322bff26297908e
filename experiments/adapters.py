"""Every adapter of the catalogue on one real task: accuracy, size, and what a step and the start cost.

Pretrained MiniLM on film reviews. Every method sees the same examples in the same order, starts from the same head,
takes the same number of steps under the same schedule, and trains about as many values as LoRA of rank 4 on all kernels
of the encoder (166 thousand) where its mathematics allows. Each method's learning rate was the best of three on the
validation split, with a seed that the experiment does not use. This searches them anew before it runs, on a grid that
grows until its best lies inside; the results here do not come from such a search yet:

    python -m experiments run adapters --set tune=True

Operations are the compiler's count for one step. Times are medians over steps that all methods take in turn within one
process; "start" is what `adapt` takes for all kernels, statistics of the data included where the method needs them.

    python -m experiments run adapters

Measured over three seeds, 32 steps, 192 test examples, in percent: most arms lie between 71 and 77, with spreads of 1
to 4, and cannot be told apart from LoRA (73.1 ± 0.3) or the head alone (74.0 ± 1.9); SoKA has 76.9 ± 2.9. Below 70
are SSF, LoRA-SB, LoLDU, PiSSA, CorDA (64 ± 7) and LoCA (62 ± 7): so few steps are too few for them, and several best
rates lie at the edge of their three. The rates were chosen with 40 steps. No method is shown to be better than
another by this.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from experiments.runner import (
    Context,
    Experiment,
    best_runs,
    human_bytes,
    mean_and_spread,
    read_json,
    widened,
    with_spread,
    write_json,
)
from experiments.tasks.adapter_arms import ARMS
from experiments.tasks.text_job import KERNELS, TextJob
from experiments.tasks.training import evaluate


@dataclasses.dataclass(frozen=True)
class AdaptersConfig:
    """Settings.

    Attributes:
      task: name of one of `subspace_jax.data.text_tasks()` with class labels.
      methods: arms to run; all of them if empty.
      seeds: one run of every method per seed; the seed draws the head, the order and the adapter.
      steps: optimizer steps of a run.
      batch_size: examples of a step.
      max_length: tokens of an example.
      train_size: training examples that a run may see.
      test_size: examples of the test split.
      calibration_batches: training batches from which statistics are gathered, for methods that need them.
      rounds: steps by which costs are measured, of every method in turn.
      tune: choose learning rates on the validation split first, in place of those of ARMS.
      tuning_seed: of the runs by which they are chosen.
    """

    task: str = "rotten_tomatoes"
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 32
    batch_size: int = 16
    max_length: int = 32
    train_size: int = 2000
    test_size: int = 192
    calibration_batches: int = 4
    rounds: int = 12
    tune: bool = False
    tuning_seed: int = 100


def run(config: AdaptersConfig, context: Context) -> dict[str, Any]:
    """Runs every arm; finished ones are kept on disk and, with `--resume`, not run again."""
    chosen = config.methods or tuple(ARMS)
    unknown = [name for name in chosen if name not in ARMS]
    if unknown:
        raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(ARMS)}.")
    sizes = ("steps", "batch_size", "max_length", "train_size", "test_size")
    job = TextJob(config.task, **{name: getattr(config, name) for name in sizes})
    (context.folder / "cells").mkdir(exist_ok=True)
    tuning = _tune(config, job, chosen, context) if config.tune else []
    best = {name: found[0]["learning_rate"] for name, found in best_runs(tuning, "accuracy").items()}
    rates = {name: best.get(name, ARMS[name].rate) for name in chosen}
    cells = []
    for name, rate in rates.items():
        for seed in config.seeds:
            path = context.folder / "cells" / f"{config.task}-{name}-{rate:g}-{seed}-{config.steps}.json"
            if not (context.resume and path.exists()):
                write_json(path, _cell(config, job, name, rate, seed, context))
            cells.append(read_json(path))
    return {"cells": cells, "costs": _costs(config, job, rates, context), "tuning": tuning}


def _adapt(config: AdaptersConfig, job: TextJob, name: str, seed: int) -> tuple[Any, Any, float]:
    """Parameters with a fresh head, the adapted tree, and the seconds that it took."""
    arm, params = ARMS[name], job.start(seed)
    started = time.perf_counter()
    stats = None
    if arm.needs is not None:
        batches = [batch for batch, _ in zip(job.batches(seed), range(config.calibration_batches), strict=False)]
        fn = job.model if arm.needs == "gram" else job.loss
        stats = sj.capture(fn, params, batches, statistics=arm.needs, select=KERNELS)  # pyright: ignore[reportArgumentType]
    batch = next(iter(job.batches(seed)))
    # Found by one abstract trace; the biases and norms of ssf need it.
    roles = sj.roles(job.model, params, batch)
    rules = {"classifier/*": sj.full(), **(arm.rules() if arm.rules_of is None else arm.rules_of(stats, roles))}
    adapted = sj.adapt(params, rules, key=jax.random.key(1000 + seed), stats=stats, roles=roles)
    return params, jax.block_until_ready(adapted), time.perf_counter() - started


def _train(
    config: AdaptersConfig, job: TextJob, name: str, rate: float, adapted: Any, seed: int, context: Context
) -> Any:
    own = ARMS[name].optimizer
    trainer = job.trainer(name, rate, None if own is None else lambda schedule: own(schedule, config.steps))
    return trainer, job.train(trainer, adapted, seed, f"{name} seed {seed}", context)


def _as_lora(adapted: Any, params: Any) -> Any:
    """The tree with residual low-rank weights as LoRA on the untouched arrays, which is smaller in a file."""
    try:
        return sj.to_lora(adapted, params)
    except sj.errors.StructureError:  # the method's weights are of another kind
        return adapted


def _cell(config: AdaptersConfig, job: TextJob, name: str, rate: float, seed: int, context: Context) -> dict[str, Any]:
    """Trains one arm with one seed, and proves what was saved."""
    params, adapted, start_seconds = _adapt(config, job, name, seed)
    _, (trained, accuracy, logits) = _train(config, job, name, rate, adapted, seed, context)
    saved = context.folder / "cells" / f"{name}.safetensors"
    sj.save_adapter(saved, _as_lora(trained.adapted, params), base=params)
    merged_accuracy, merged_logits = evaluate(
        job.logits, sj.merge(sj.load_adapter(saved, params)), job.held_out("test")
    )
    difference = float(np.abs(merged_logits - logits).max())
    if difference > 1e-3 * max(1.0, float(np.abs(logits).max())):
        raise RuntimeError(f"{name}: saved, loaded and merged, logits differ by {difference:.2e} ({merged_accuracy}).")
    return {
        "method": name,
        "learning_rate": rate,
        "seed": seed,
        "accuracy": accuracy,
        "trainable": sj.summary(trained.adapted).trainable,
        "start_seconds": start_seconds,
        "state_bytes": trained.state_bytes,
        "saved_bytes": saved.stat().st_size,
        "merged_difference": difference,
        "last_loss": float(np.mean(trained.losses[-5:])),
    }


def _costs(config: AdaptersConfig, job: TextJob, rates: Mapping[str, float], context: Context) -> dict[str, Any]:
    """Operations and time of a step. Methods take turns, so that what else the machine does meets all of them."""
    batch = next(iter(job.batches(0)))
    steps, found = {}, {}
    for name, rate in context.track(rates.items(), "compiling steps"):
        _, adapted, _ = _adapt(config, job, name, 0)
        own = ARMS[name].optimizer
        trainer = job.trainer(name, rate, None if own is None else lambda s, own=own: own(s, config.steps))
        steps[name] = trainer.timed_step(adapted, batch)
        found[name] = {"step_flops": trainer.flops, "seconds": []}
    for _ in context.track(range(config.rounds), "timing steps in turn"):
        for name in rates:
            found[name]["seconds"].append(steps[name]())
    return {name: {**one, "step_seconds": float(np.median(one["seconds"]))} for name, one in found.items()}


def _tune(config: AdaptersConfig, job: TextJob, chosen: Sequence[str], context: Context) -> list[dict[str, Any]]:
    """Validation accuracy of every arm at rates among which the best lies inside."""
    found: list[dict[str, Any]] = []
    for name in chosen:
        _, adapted, _ = _adapt(config, job, name, config.tuning_seed)

        def score(rate: float, name: str = name, adapted: Any = adapted) -> float:
            path = context.folder / "cells" / f"{config.task}-{name}-{rate:g}-tuning-{config.steps}.json"
            if not (context.resume and path.exists()):
                _, (trained, _, _) = _train(config, job, name, rate, adapted, config.tuning_seed, context)
                accuracy, _ = evaluate(job.logits, trained.adapted, job.held_out("validation"))
                last = {"accuracy": accuracy, "last_loss": float(np.mean(trained.losses[-5:]))}
                write_json(path, {"method": name, "learning_rate": rate, "seed": config.tuning_seed, **last})
            found.append(read_json(path))
            return found[-1]["accuracy"]

        widened((ARMS[name].rate,), score)
    return found


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns one line per method; costs are relative to LoRA's."""
    cells = results["cells"]
    header = [
        "method",
        "test accuracy %",
        "trained values",
        "saved",
        "operations / LoRA",
        "step time / LoRA",
        "start, s",
    ]
    table, costs = [header], results["costs"]
    for method in dict.fromkeys(c["method"] for c in cells):
        mine = [c for c in cells if c["method"] == method]
        flops, seconds = (_ratio(costs, method, key) for key in ("step_flops", "step_seconds"))
        # The first start compiles; the others show what remains.
        start = f"{min(c['start_seconds'] for c in mine):.1f}"
        accuracy = with_spread([c["accuracy"] for c in mine])
        size = human_bytes(mine[0]["saved_bytes"])
        table.append([method, accuracy, f"{mine[0]['trainable']:,}", size, flops, seconds, start])
    return table


def _ratio(costs: Mapping[str, Any], method: str, key: str) -> str:
    return f"{costs[method][key] / costs['lora'][key]:.2f}" if "lora" in costs else ""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy over the number of trained values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = results.get("cells", [])
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for method in dict.fromkeys(c["method"] for c in cells):
        mine = [c for c in cells if c["method"] == method]
        mean, spread = mean_and_spread([100 * c["accuracy"] for c in mine])
        axes.errorbar(mine[0]["trainable"], mean, spread, marker="o", capsize=3)
        axes.annotate(method, (mine[0]["trainable"], mean), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="trained values", ylabel="test accuracy %", xscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


EXPERIMENT = Experiment(
    name="adapters",
    claim="All adapters on one real task at about one budget: none stands out in accuracy, all differ in cost.",
    config=AdaptersConfig,
    run=run,
    rows=rows,
    plot=plot,
    assets=("quickstart",),
)
