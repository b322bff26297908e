"""Tables and the picture of the league's results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runner import human_bytes, mean_and_spread, with_spread


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns one line per method and task, the most accurate first; costs are relative to LoRA's."""
    header = [
        "task",
        "method",
        "accuracy %",
        "forgotten",
        "trained",
        "saved",
        "operations",
        "time",
        "memory",
        "start, s",
    ]
    table = [header]
    for task, before in results["before"].items():
        lines = [_line(results, task, name, before["retained"]) for name in _methods(results, task)]
        table += [line for _, line in sorted(lines, key=lambda pair: -pair[0])]
    return table


def _methods(results: Mapping[str, Any], task: str) -> list[str]:
    return list(dict.fromkeys(c["method"] for c in results["cells"] if c["task"] == task))


def _cells(results: Mapping[str, Any], task: str, method: str) -> list[Mapping[str, Any]]:
    return [c for c in results["cells"] if (c["task"], c["method"]) == (task, method)]


def _line(results: Mapping[str, Any], task: str, method: str, before: float) -> tuple[float, list[str]]:
    """Mean accuracy, and the line of one method on one task."""
    cells = _cells(results, task, method)
    costs = {c["method"]: c for c in results["costs"] if c["task"] == task}
    accuracy = [c["accuracy"] for c in cells]
    lora = costs.get("lora", costs[method])
    return mean_and_spread(accuracy)[0], [
        task,
        method,
        with_spread(accuracy),
        with_spread([before - c["retained"] for c in cells]),
        f"{cells[0]['trainable']:,}",
        human_bytes(cells[0]["saved_bytes"]),
        f"{costs[method]['step_flops'] / lora['step_flops']:.2f}",
        f"{costs[method]['time_ratio']:.2f}",
        f"{costs[method]['memory_bytes'] / 2**20:.0f} MiB",
        # The first start compiles; the others show what remains.
        f"{min(c['start_seconds'] for c in cells):.1f}",
    ]


def overview(results: Mapping[str, Any], tasks: Sequence[str] = ()) -> Sequence[Sequence[str]]:
    """Returns one line per method with its accuracy on every task, the best in the mean over tasks first.

    What is forgotten and the time of a step over LoRA's are means over tasks; trained values and the file are of the
    first task. A method that is not in all tasks has empty cells and comes last.

    Args:
      results: of the league.
      tasks: those that count; all if empty.
    """
    tasks = list(tasks or results["before"])
    every = rows(results)[1:]
    lines = {task: {line[1]: line for line in every if line[0] == task} for task in tasks}
    names = dict.fromkeys(name for task in tasks for name in lines[task])
    table = []
    for name in names:
        mine = [lines[task].get(name) for task in tasks]
        there = [line for line in mine if line is not None]
        accuracy = statistics.fmean(float(line[2].split()[0]) for line in there)
        cells = [name, *("" if line is None else line[2] for line in mine)]
        cells += [f"{statistics.fmean(float(line[3].split()[0]) for line in there):.1f}", *there[0][4:6]]
        cells.append(f"{statistics.fmean(float(line[7]) for line in there):.2f}")
        table.append(((len(there), accuracy), cells))
    table.sort(key=lambda pair: pair[0], reverse=True)
    head = ["method", *(f"{task} %" for task in tasks), "forgotten", "trained", "saved", "time / LoRA"]
    return [head, *(cells for _, cells in table)]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy over what was forgotten, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = results["before"]
    figure, panels = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 5), layout="constrained", squeeze=False)
    for axes, (task, before) in zip(panels[0], tasks.items(), strict=True):
        for method in _methods(results, task):
            cells = _cells(results, task, method)
            lost, lost_spread = mean_and_spread([100 * (before["retained"] - c["retained"]) for c in cells])
            mean, spread = mean_and_spread([100 * c["accuracy"] for c in cells])
            axes.errorbar(lost, mean, spread, lost_spread, marker="o", markersize=4, elinewidth=0.5)
            axes.annotate(method, (lost, mean), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(title=task, xlabel=f"points forgotten: {before['known']}", ylabel="test accuracy %")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
