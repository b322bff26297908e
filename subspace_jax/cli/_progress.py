"""Shows how far a run is: a bar with loss, rate and the time left, on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._console import console


class RunProgress:
    """A bar over the optimizer steps; evaluations are printed above it.

    Args:
      steps: in all.
      title: in front of the bar.
    """

    def __init__(self, steps: int, title: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console(stderr=True),
        )
        self._bar = self._progress.add_task(title, total=steps, note="")

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def on_step(self, number: int, loss: float, rate: float) -> None:
        """Moves the bar to a step."""
        self._progress.update(self._bar, completed=number, note=f"loss {loss:.3f}  rate {rate:.1e}")

    def on_evaluation(self, number: int, metrics: Mapping[str, float]) -> None:
        """Prints the metrics of an evaluation."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._progress.print(f"step {number}: {shown}")
