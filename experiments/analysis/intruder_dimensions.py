"""Intruder dimensions of LoRA and of full fine-tuning, beside what each forgets.

A network 64-128-128-10 that reads upright digits learns them turned by 90 degrees, its two hidden kernels by full
fine-tuning or by LoRA of alpha 2 r. Counted: intruders among the ten leading vectors of both kernels at a threshold of
0.6; the loss on upright digits before and after, and after the top intruder of each kernel, or the vector of the
nearest singular value that is none, is scaled by 0.9. Rates are those of the specification of the experiment; a run at
a second rate of each kind shows how the count moves with it.

    python -m experiments run intruder_dimensions

Measured over three seeds: scaling the top intruder of each kernel by 0.9 lowers the loss on upright digits by 16 to
21 % after LoRA of every rank, and the control by 0 to 3 %, at 1 to 4 points of accuracy on turned digits for rank 1
and less than one for ranks 2 and 4. After full fine-tuning neither changes it by more than about 2 %, hardly more
than its spread. LoRA forgets more than full fine-tuning at every rank and rate, 3.1 to 36 against 0.4 to 1.4 in loss.

Not reproduced: that full fine-tuning has almost no intruders. It has 1 to 4 at the rate of the specification (LoRA of
rank 1: 2 to 3, of rank 4: 9 to 12) and 5 to 7 at a rate of 1e-3, which also learns more of the task. Over all arms the
count and forgetting go together hardly at all: rank correlation 0.21, p = 0.4. Counts grow with rank and rate, and what
is forgotten shrinks with rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from scipy.stats import spearmanr

import subspace_jax as sj
from experiments.runner import Context, Experiment, with_spread
from experiments.tasks import digits_task
from subspace_jax.methods.analysis.intruder_dimensions import (
    count_intruders,
    effective_rank,
    intruder_dimensions,
    scale_intruders,
)


@dataclasses.dataclass(frozen=True)
class IntruderConfig:
    """Settings.

    Attributes:
      threshold: of similarity.
      factor: that intruders are scaled by.
      arms: name, rank (0 for full), steps and learning rate.
      seeds: one network each.
    """

    threshold: float = 0.6
    factor: float = 0.9
    arms: tuple[tuple[str, int, int, float], ...] = (
        ("full", 0, 600, 3e-4),
        ("full, higher rate", 0, 600, 1e-3),
        ("LoRA, r = 1", 1, 1500, 1e-2),
        ("LoRA, r = 1, lower rate", 1, 1500, 3e-3),
        ("LoRA, r = 2", 2, 1200, 5e-3),
        ("LoRA, r = 4", 4, 800, 5e-3),
        ("LoRA, r = 4, lower rate", 4, 800, 2e-3),
    )
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: IntruderConfig, context: Context) -> dict[str, Any]:
    """Trains every arm, counts, scales, and measures on both sets of digits."""
    upright, turned, runs = digits_task.load_digits(), digits_task.load_digits(1), []
    optimizers = {arm: optax.adam(arm[3]) for arm in config.arms}
    score = jax.jit(lambda p: (digits_task.loss(p, upright.x_test, upright.y_test), digits_task.accuracy(p, turned)))
    for arm, seed in context.track([(a, s) for a in config.arms for s in config.seeds], "intruders"):
        name, rank, steps, rate = arm
        method = sj.lora(rank, alpha=2.0 * rank) if rank else sj.full()
        before = digits_task.pretrained(seed)
        adapted = sj.adapt(before, {digits_task.HIDDEN: method}, key=jax.random.key(100 + seed))
        trained, _ = digits_task.fit(adapted, jax.random.key(200 + seed), (turned.x, turned.y), optimizers[arm], steps)
        after = sj.merge(trained)
        options = {"threshold": config.threshold, "select": digits_task.HIDDEN}
        found = intruder_dimensions(before, after, **options)
        ranks = [effective_rank(after[p]["kernel"] - before[p]["kernel"]) for p in ("hidden_0", "hidden_1")]
        record = {"method": name, "learning_rate": rate, "seed": seed, "intruders": count_intruders(found)}
        record["effective_rank"] = float(np.mean(ranks))
        record["base"] = [float(v) for v in score(before)]
        record["tuned"] = [float(v) for v in score(after)]
        for key, control in (("scaled", False), ("control", True)):
            scaled = scale_intruders(before, after, config.factor, control=control, **options)
            record[key] = [float(v) for v in score(scaled)]
        runs.append(record)
    pairs = [(r["intruders"], r["tuned"][0] - r["base"][0]) for r in runs]
    found = spearmanr(*zip(*pairs, strict=True))
    return {"runs": runs, "spearman": [float(found.statistic), float(found.pvalue)]}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns one line per arm."""
    table = [
        [
            "method",
            "intruders",
            "rank of the change",
            "turned %",
            "upright loss",
            "scaled",
            "control",
            "turned % scaled",
        ]
    ]
    for name in dict.fromkeys(r["method"] for r in results["runs"]):
        mine = [r for r in results["runs"] if r["method"] == name]
        changes = (with_spread([r[key][0] / r["tuned"][0] - 1 for r in mine]) for key in ("scaled", "control"))
        table.append(
            [
                name,
                " ".join(str(r["intruders"]) for r in mine),
                with_spread([r["effective_rank"] for r in mine], 1, 1.0),
                with_spread([r["tuned"][1] for r in mine]),
                with_spread([r["tuned"][0] for r in mine], 2, 1.0),
                *(f"{change} %" for change in changes),
                with_spread([r["scaled"][1] for r in mine]),
            ]
        )
    statistic, chance = results["spearman"]
    table.append(["rank correlation of intruders and forgetting", f"{statistic:.2f}", f"p = {chance:.1g}", *[""] * 5])
    return table


EXPERIMENT = Experiment(
    name="intruder_dimensions",
    claim="LoRA leaves large singular vectors that the pretrained kernel has not; scaling them down forgets less.",
    config=IntruderConfig,
    run=run,
    rows=rows,
)
