"""Where commands print: results to stdout, progress and remarks to stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """Returns a console as wide as the terminal, plain where the output is no terminal.

    Args:
      stderr: for progress and remarks; results go to stdout so that they can be piped.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yields the items while a bar on stderr shows how many are done and how long the rest takes.

    Args:
      items: what to go through.
      description: what is done, in a few words.
      total: how many there are, where `items` has no length.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=description)
