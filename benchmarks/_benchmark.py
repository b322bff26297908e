"""What a benchmark is, and how it is found by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console

import benchmarks
from benchmarks._charts import Chart, Roofline
from experiments import runner

Rows = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One entry of `python -m benchmarks list`.

    Attributes:
      name: what it is called on the command line.
      claim: what it measures, in one sentence.
      config: frozen dataclass of its settings, all with defaults.
      run: makes JSON-able results of a configuration.
      tables: titles and rows, header first, of a result.
      charts: what of a result is drawn.
      device: what it is for; on another it shows that it runs, and no more.
    """

    name: str
    claim: str
    config: type
    run: Callable[[Any, Console], dict[str, Any]]
    tables: Callable[[Mapping[str, Any]], Sequence[tuple[str, Rows]]]
    charts: Callable[[Mapping[str, Any]], Sequence[Chart | Roofline]] | None = None
    device: Literal["cpu", "gpu"] = "cpu"


def number(value: float | None, digits: int = 2, absent: str = "-") -> str:
    """Returns a figure of a table, which may not have been measured.

    >>> number(1.234), number(None)
    ('1.23', '-')
    """
    return absent if value is None else f"{value:.{digits}f}"


def find(name: str) -> Benchmark:
    """Returns a benchmark.

    Args:
      name: its name.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    return runner.entry(benchmarks, name)
