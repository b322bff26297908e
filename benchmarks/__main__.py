"""The command line: list, run and page."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import benchmarks
from benchmarks._benchmark import find
from benchmarks._results import FOLDER, save, write_page
from experiments import runner
from experiments.runner import configure, terminal_table

Folder = Annotated[Path, tyro.conf.arg(help="Folder of results.")]


def list_benchmarks(name: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Show all benchmarks, or one with its settings.

    Args:
      name: a benchmark, to show its settings.
    """
    runner.list_entries(benchmarks, name, Console())


def run(name: tyro.conf.Positional[str], settings: runner.Settings = (), out: Folder = FOLDER) -> None:
    """Run one benchmark: tables, a JSON file and the page of all results.

    Args:
      name: the benchmark, one of `list`.
    """
    console = Console()
    benchmark = find(name)
    config = configure(benchmark.config, settings)
    results = benchmark.run(config, console)
    for title, rows in benchmark.tables(results):
        console.print(terminal_table(rows, title))
    console.print(f"In {save(name, dataclasses.asdict(config), results, out)}")


def page(out: Folder = FOLDER) -> None:
    """Write the page of all results anew from their JSON files."""
    write_page(out)


def main(arguments: list[str]) -> None:
    """Runs the command line; a benchmark's name alone means `run` of it."""
    if arguments and arguments[0] in runner.names(benchmarks):
        arguments = ["run", *arguments]
    commands = {"list": list_benchmarks, "run": run, "page": page}
    runner.run_commands(benchmarks, commands, "Benchmarks of subspace_jax beside its alternatives.", arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
