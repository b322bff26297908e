"""What an experiment is: a configuration, a function from it to results, and what to show of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.runner._results import grids

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Context:
    """Where an experiment runs and whom it tells.

    Attributes:
      folder: for its files; exists.
      resume: keep finished parts that are in the folder.
      console: for words.
    """

    folder: Path
    resume: bool
    console: Console

    def progress(self) -> Progress:
        """Returns a progress display with what is measured, elapsed and remaining time; a context manager."""
        return Progress(
            # All of it fits into 80 columns.
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yields items while a bar shows how many are done."""
        items = list(items)
        with self.progress() as progress:
            task = progress.add_task(description, total=len(items), note="")
            for item in items:
                yield item
                progress.advance(task)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """By which figure of its runs an experiment chooses the learning rate of each arm.

    The command line checks that every arm's best rate lies inside its grid and writes grid and best into the result.

    Attributes:
      key: name of the figure in a run.
      smallest: whether small is good.
      arm: name of the entry of a run that names the arm.
      runs: name of the entry of the result that holds the runs.
    """

    key: str = "accuracy"
    smallest: bool = False
    arm: str = "method"
    runs: str = "runs"

    def grids(self, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns every arm's learning rates in a result, the best, and whether it lies at the edge of its grid."""
        return grids(results.get(self.runs, []), self.key, smallest=self.smallest, arm=self.arm)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One entry of `python -m experiments list`.

    Attributes:
      name: what it is called on the command line.
      claim: what it shows, in one sentence.
      config: frozen dataclass of its settings, all with defaults.
      run: makes JSON-able results of a configuration.
      rows: the table of a result, header first.
      plot: draws a result into a file, where a picture says more.
      assets: packages of real data and weights that it needs.
      tuning: how the best learning rate of each arm is found among its `runs`; None where nothing is tuned.
    """

    name: str
    claim: str
    config: type
    run: Callable[[Any, Context], dict[str, Any]]
    rows: Callable[[Mapping[str, Any]], Sequence[Sequence[str]]]
    plot: Callable[[Mapping[str, Any], Path], None] | None = None
    assets: tuple[str, ...] = ()
    tuning: Tuning | None = None
