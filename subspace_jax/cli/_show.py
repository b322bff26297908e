"""What a run shows before it trains: data, one example with its mask, adapted leaves, estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import subspace_jax as sj

from ._backbone import Backbone
from ._examples import Prepared

if TYPE_CHECKING:
    from rich.console import Console

    from ._train import Job

ROWS_SHOWN = 8


def show_data(output: Console, prepared: Prepared) -> None:
    """Prints counts, ignored columns, and rows that lost something."""
    report = prepared.report
    train, held = (len(report[f"{part}_numbers"]) for part in ("train", "validation"))
    output.print(f"{report['source']}: {prepared.form}, {report['rows']} rows: {train} to train, {held} to validate")
    if prepared.classes:
        output.print(f"classes: {', '.join(map(str, prepared.classes))}")
    if report.get("ignored_columns"):
        output.print(f"ignored columns: {', '.join(report['ignored_columns'])}")
    for name, meaning in (
        ("cut_rows", f"were cut to {report.get('max_length')} tokens"),
        ("unended_rows", "lost their end token, so the model does not learn to stop there"),
        ("empty_rows", "lost all they would teach, and are left out"),
    ):
        if rows := report.get(name):
            more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
            output.print(f"[yellow]rows {', '.join(map(str, rows[:ROWS_SHOWN]))}{more} {meaning}[/yellow]")


def show_example(output: Console, prepared: Prepared, backbone: Backbone) -> None:
    """Prints the first training example as the model sees it; what it learns to write is marked."""
    from rich.markup import escape

    arrays = prepared.train.arrays
    if "images" in arrays:
        return
    tokenizer = backbone.tokenizer
    tokens = arrays["tokens"][0]
    output.print(f"the first example (row {prepared.train.rows[0][0]}), as the model sees it:")
    if prepared.classes:
        text = tokenizer.decode(tokens[arrays["mask"][0]].tolist(), skip_special_tokens=False)
        label = prepared.classes[int(arrays["labels"][0])]
        output.print(f"  {escape(text)} [bold green]-> {escape(str(label))}[/bold green]")
        return
    inside = arrays["segments"][0] == 1
    tokens, labels = tokens[inside], arrays["labels"][0][inside]
    edges = np.flatnonzero(np.diff(labels.astype(np.int8))) + 1
    parts = []
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(tokens)], strict=True):
        text = escape(tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False))
        parts.append(f"[bold green]{text}[/bold green]" if labels[start] else f"[dim]{text}[/dim]")
    output.print("  " + "".join(parts))
    output.print(f"  {int(labels.sum())} of {len(tokens)} tokens are labels (shown bold)")


def show_leaves(output: Console, method: str, job: Job) -> None:
    """Prints the table of what the method adapts."""
    summary = sj.summary(job.adapted)
    output.print(f"{method}: {summary.trainable:,} trained values, peak rate {job.rate:g}, {job.steps} steps")
    output.print(str(summary), markup=False, soft_wrap=True)


def show_estimates(output: Console, job: Job, estimates: Mapping[str, float]) -> None:
    """Prints memory and time that the run will take."""
    memory, seconds = estimates["memory_bytes"] / 2**30, estimates["seconds"]
    output.print(
        f"estimate: {memory:.2f} GiB of memory, {_time(seconds)} in all ({estimates['step_seconds']:.2f} s a step)"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def show_comparison(output: Console, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the methods of a comparison beside each other."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    table = Table("method", *names, title="kept state of each method, validation", title_justify="left")
    for method, row in metrics.items():
        table.add_row(method, *(_cell(name, row[name]) for name in names))
    output.print(table)


def _cell(name: str, value: Any) -> str:
    return str(int(value)) if name == "step" else f"{value:.4f}"
