"""The table and the picture of a stream's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner import human_bytes, mean_and_spread, with_spread
from experiments.tasks.streams._learners import TITLES


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the table: one line per method, with the accuracies of both scenarios."""
    table = [
        [
            *("method", "learning rate", "class-incremental accuracy %", "backward transfer %"),
            *("task-incremental accuracy %", "backward transfer %", "accuracy when learned %"),
            *("learner's state", "step time / full"),
        ]
    ]
    spent = {c["method"]: c for c in results["costs"]}
    plain = spent.get("full")
    for method in spent:
        runs = [r for r in results["runs"] if r["method"] == method]
        pairs = [(s, n) for s in ("class", "task") for n in ("average_accuracy", "backward_transfer")]
        scores = [with_spread([r[s][n] for r in runs]) for s, n in [*pairs, ("task", "learning_accuracy")]]
        if method == "joint":  # there is no time at which it learned a task
            scores[1] = scores[3] = scores[4] = ""
        cost = spent[method]
        relative = f"{cost['step_seconds'] / plain['step_seconds']:.2f}" if plain else ""
        rate = f"{runs[0]['learning_rate']:g}"
        table.append([TITLES[method], rate, *scores, human_bytes(cost["state_bytes"]), relative])
    return table


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws the class-incremental accuracy matrix of every method, the mean over seeds, by place in the order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(r["method"] for r in results["runs"]))
    columns = min(5, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.7 * columns, 2.9 * lines), squeeze=False)
    image = None
    for axis in axes.ravel()[len(methods) :]:
        axis.axis("off")
    for axis, method in zip(axes.ravel(), methods, strict=False):
        found = [r["class"] for r in results["runs"] if r["method"] == method]
        mean = 100 * np.mean([np.array(r["matrix"], float) for r in found], axis=0)
        image = axis.imshow(mean, vmin=0, vmax=100, cmap="viridis")
        for (row, column), value in np.ndenumerate(mean):
            if np.isfinite(value):
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
        spread = mean_and_spread([r["average_accuracy"] for r in found])
        axis.set_title(f"{TITLES[method]}\n{100 * spread[0]:.1f} ± {100 * spread[1]:.1f} %", fontsize=8)
        axis.set_xticks(range(len(mean)), range(1, len(mean) + 1))
        axis.set_yticks(range(len(mean)), range(1, len(mean) + 1))
        axis.set_xlabel("accuracy on task", fontsize=8)
        axis.set_ylabel("after training on task", fontsize=8)
    figure.tight_layout()
    if image is not None:
        figure.colorbar(image, ax=axes, label="%", shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
