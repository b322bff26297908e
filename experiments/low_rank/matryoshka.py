"""MatryoshkaLoRA on shifted and on permuted digits: one adapter, used at every rank, beside cut LoRA and DyLoRA.

The network of `digits_task` is adapted to digits shifted by one pixel, and to digits whose pixels are in another order.
Every way of training has the same data, steps, starting factors and seven learning rates, of which the one with the
best area under the log rank curve counts.

    python -m experiments run matryoshka

Measured over four seeds at the best of seven rates, accuracy at rank 1 / 4 / 16 and area under the log rank curve, in
percent:

| method | shifted digits | area | permuted digits | area |
| --- | --- | --- | --- | --- |
| LoRA, cut afterwards | 57 / 76 / 96.5 | 76.5 ± 2.0 | 10 / 38 / 95.3 | 45.8 ± 3.2 |
| DyLoRA | 88 / 96 / 96.9 | 94.6 ± 0.8 | 63 / 91 / 92.6 | 85.6 ± 2.3 |
| Matryoshka, one rank's own scale, as published | 54 / 62 / 93.0 | 67.3 ± 3.2 | 8 / 32 / 80.1 | 37.1 ± 5.4 |
| Matryoshka, gains of training kept | 60 / 83 / 97.8 | 82.1 ± 1.3 | 16 / 55 / 97.5 | 57.2 ± 1.5 |
| mean loss over ranks, five forward passes | 89 / 97 / 97.3 | 95.7 ± 0.4 | 74 / 94 / 93.4 | 90.8 ± 0.9 |

So at full rank Matryoshka with its gains kept is best of all, 0.9 points above DyLoRA on shifted digits, about one
spread, and 4.9 on permuted ones, where every rank is needed; its area is 5.6 and 11.4 above that of cut LoRA.

Claims that did not reproduce: Matryoshka used as published is below every other arm, and DyLoRA's area is above both,
because the sum of five adapters was trained and one is used. A loss averaged over the ranks has the best area.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, best_runs, with_spread
from experiments.tasks import digits_task


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig:
    """Settings.

    Attributes:
      ranks: the ranks that are to be usable; the last is the adapter's.
      steps: optimizer steps.
      batch_size: digits of a step.
      rates: learning rates tried.
      tasks: of TASKS: what happens to the digits.
      seeds: one network and one run of every arm per seed.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: int = 300
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    tasks: tuple[str, ...] = ("shifted", "permuted")
    seeds: tuple[int, ...] = (0, 1, 2, 3)


Objective = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def _plain(adapted: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    del key
    return digits_task.loss(adapted, x, y)


def _sampled(adapted: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """DyLoRA: one random rank at each step."""
    return digits_task.loss(sj.methods.matryoshka.sample_rank(adapted, key)[0], x, y)


def _mean_over_ranks(adapted: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean loss over all ranks used alone: as many forward passes as ranks."""
    del key
    ranks = next(w.ranks for w in jax.tree.leaves(adapted, is_leaf=sj.core.is_weight) if isinstance(w, sj.Weight))
    return jax.vmap(lambda rank: digits_task.loss(sj.methods.matryoshka.at_rank(adapted, rank), x, y))(
        jnp.asarray(ranks)
    ).mean()


# How each arm trains, and with which gains it is used at a rank.
ARMS: dict[str, tuple[Objective, bool, tuple[str, ...]]] = {
    "LoRA, cut": (_plain, False, ("published",)),
    "DyLoRA": (_sampled, True, ("published",)),
    "Matryoshka": (_plain, True, ("published", "keep_p")),
    "mean loss over ranks": (_mean_over_ranks, True, ("published",)),
}


def shifted(digits: digits_task.Digits) -> digits_task.Digits:
    """Returns the digits moved by one pixel to the right, the left column empty."""

    def move(x: jax.Array) -> jax.Array:
        images = np.asarray(x).reshape(-1, 8, 8)
        return jnp.asarray(np.pad(images[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-0.5).reshape(-1, 64))

    return dataclasses.replace(digits, x=move(digits.x), x_test=move(digits.x_test))


def permuted(digits: digits_task.Digits) -> digits_task.Digits:
    """Returns the digits with their pixels in another order, the same for all."""
    order = np.random.default_rng(0).permutation(digits.x.shape[1])
    return dataclasses.replace(digits, x=digits.x[:, order], x_test=digits.x_test[:, order])


TASKS = {"shifted": shifted, "permuted": permuted}


@functools.partial(jax.jit, static_argnames=("objective", "steps", "batch_size"))
def train(
    adapted: Any,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    rate: jax.Array,
    objective: Objective,
    steps: int,
    batch_size: int,
) -> Any:
    """Trains what learns with Adam; one compiled loop for every rate and seed."""

    def loss(adapted: Any, key: jax.Array) -> jax.Array:
        rows_key, rank_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, len(x))
        return objective(adapted, rank_key, x[rows], y[rows])

    return sj.training.scan_steps(loss, optax.adam(rate), adapted, jax.random.split(key, steps)).adapted


def run(config: MatryoshkaConfig, context: Context) -> dict[str, Any]:
    """Trains every arm and measures it at every rank."""
    made = {task: TASKS[task](digits_task.load_digits()) for task in config.tasks}
    largest = config.ranks[-1]
    runs = []
    jobs = [(t, arm, rate, seed) for t in made for arm in ARMS for rate in config.rates for seed in config.seeds]
    for task, arm, rate, seed in context.track(jobs, "changed digits"):
        digits = made[task]
        objective, nested, inferences = ARMS[arm]
        ranks = config.ranks if nested else (largest,)
        method = sj.matryoshka(sj.lora(largest), ranks=ranks, a_init="lora")
        adapted = sj.adapt(digits_task.pretrained(seed), {digits_task.HIDDEN: method}, key=jax.random.key(100 + seed))
        key = jax.random.key(200 + seed)
        trained = train(adapted, key, digits.x, digits.y, jnp.float32(rate), objective, config.steps, config.batch_size)
        for inference in inferences:
            scores = [
                float(
                    _accuracy(
                        sj.methods.matryoshka.at_rank(trained, rank, inference=inference), digits.x_test, digits.y_test
                    )
                )
                for rank in config.ranks
            ]
            name = f"{arm}, {inference}" if len(inferences) > 1 else arm
            runs.append(
                {
                    **{
                        "arm": f"{task}: {name}",
                        "task": task,
                        "method": name,
                        "learning_rate": rate,
                        "seed": seed,
                        "ranks": list(config.ranks),
                    },
                    **{"accuracies": scores, "aurac_log": sj.metrics.aurac(config.ranks, scores)},
                    "aurac_linear": sj.metrics.aurac(config.ranks, scores, log=False),
                }
            )
    return {"runs": runs}


@jax.jit
def _accuracy(adapted: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(digits_task.apply(adapted, x).argmax(-1) == y)


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns accuracy at every rank and both areas, in percent."""
    best = best_runs(results["runs"], "aurac_log", arm="arm")
    ranks = next(iter(best.values()))[0]["ranks"]
    table = [["method", "rate", *(f"r = {r}" for r in ranks), "AURAC (log)", "AURAC"]]
    for arm, found in best.items():
        each = [with_spread([r["accuracies"][i] for r in found]) for i in range(len(ranks))]
        areas = [with_spread([r[name] for r in found]) for name in ("aurac_log", "aurac_linear")]
        table.append([arm, f"{found[0]['learning_rate']:g}", *each, *areas])
    return table


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy over rank with its spread over seeds."""
    import matplotlib.pyplot as plt

    best = best_runs(results["runs"], "aurac_log", arm="arm")
    tasks = list(dict.fromkeys(r["task"] for r in results["runs"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.4 * len(tasks), 4.2), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for found in (runs for runs in best.values() if runs[0]["task"] == task):
            scores = 100 * np.asarray([r["accuracies"] for r in found])
            options = {"marker": "o", "capsize": 3, "label": found[0]["method"]}
            axis.errorbar(found[0]["ranks"], scores.mean(0), scores.std(0, ddof=1), **options)
            axis.set_xticks(found[0]["ranks"], [str(r) for r in found[0]["ranks"]])
        axis.set(xlabel="rank in use", ylabel="test accuracy %", xscale="log", title=f"{task} digits")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


EXPERIMENT = Experiment(
    name="matryoshka",
    claim="With gains kept, it beats cut LoRA at every rank and DyLoRA at the full one; DyLoRA's area is larger.",
    config=MatryoshkaConfig,
    run=run,
    rows=rows,
    tuning=Tuning("aurac_log", arm="arm"),
    plot=plot,
)
