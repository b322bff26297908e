"""Results with their circumstances: JSON files, tables for the terminal and for Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

PACKAGES = ("subspace-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Returns versions and hardware, without anything that names a machine."""
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    """The processor's model where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is either the old one or the new one, whole."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation; the latter is 0 for one value, NaN if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int = 1, factor: float = 100.0) -> str:
    """Returns values as `mean ± standard deviation`, in percent by default."""
    mean, spread = mean_and_spread(values)
    return f"{factor * mean:.{digits}f} ± {factor * spread:.{digits}f}"


def human_bytes(count: float) -> str:
    """Returns a number of bytes with a unit.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def terminal_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Returns rows, header first, as a table for the terminal.

    A first column that says the same in every row goes into the title: of 80 columns the others need all.
    """
    header, *body = rows
    named = 2
    if len(body) > 1 and len(header) > 2 and len({row[0] for row in body}) == 1:
        title = f"{title} ({header[0]} {body[0][0]})"
        header, body, named = header[1:], [row[1:] for row in body], 1
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < named else "right")
    for row in body:
        table.add_row(*row)
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows, header first, as a Markdown table.

    >>> print(markdown_table([["a", "b"], ["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best_runs(
    runs: Sequence[Mapping[str, Any]], key: str, *, smallest: bool = False, arm: str = "method"
) -> dict[str, list[Mapping[str, Any]]]:
    """Returns every arm's runs at the learning rate whose mean of `key` over seeds is best; not a number is worst."""
    best: dict[str, list[Mapping[str, Any]]] = {}
    worst = math.inf if smallest else -math.inf

    def score(found: Sequence[Mapping[str, Any]]) -> float:
        mean = statistics.fmean(r[key] for r in found)
        return mean if math.isfinite(mean) else worst

    for name in dict.fromkeys(r[arm] for r in runs):
        by_rate: dict[float, list[Mapping[str, Any]]] = {}
        for r in runs:
            if r[arm] == name:
                by_rate.setdefault(r["learning_rate"], []).append(r)
        best[name] = (min if smallest else max)(by_rate.values(), key=score)
    return best


def grids(
    runs: Sequence[Mapping[str, Any]], key: str, *, smallest: bool = False, arm: str = "method"
) -> dict[str, dict[str, Any]]:
    """Returns every arm's learning rates, the best of them, and whether it lies at the edge of its grid.

    >>> runs = [{"method": "a", "learning_rate": r, "accuracy": r} for r in (0.1, 0.2)]
    >>> grids(runs, "accuracy")
    {'a': {'rates': [0.1, 0.2], 'best': 0.2, 'at_edge': True}}
    """
    found = {}
    for name, best in best_runs(runs, key, smallest=smallest, arm=arm).items():
        rates = sorted({r["learning_rate"] for r in runs if r[arm] == name})
        rate = best[0]["learning_rate"]
        found[name] = {"rates": rates, "best": rate, "at_edge": rate in (rates[0], rates[-1])}
    return found


def best_rates(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a table of the learning rate with the best mean accuracy of every method."""
    table = [["method", "adapter values", "learning rate", "test accuracy %", "loss of steps 20-30"]]
    for method, best in best_runs(runs, "accuracy").items():
        table.append(
            [
                *(method, f"{best[0]['adapter_values']:,}", f"{best[0]['learning_rate']:g}"),
                with_spread([r["accuracy"] for r in best]),
                with_spread([r["early_loss"] for r in best], 2, 1.0),
            ]
        )
    return table
