"""The command line: list, run and page."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import _benchmark
from benchmarks._results import FOLDER, save, write_page
from experiments.runner import configure, terminal_table

Settings = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="set", help="Settings as key=value, lists with commas: --set rank=16 layouts=scan,remat."),
]
Folder = Annotated[Path, tyro.conf.arg(help="Folder of results.")]


def list_benchmarks(name: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Show all benchmarks, or one with its settings.

    Args:
      name: a benchmark, to show its settings.
    """
    console = Console()
    if name is None:
        table = Table("name", "what it measures", title="python -m benchmarks run NAME", title_justify="left")
        for known in _benchmark.names():
            table.add_row(known, _benchmark.find(known).claim)
        console.print(table)
        return
    benchmark = _benchmark.find(name)
    table = Table("setting", "default", title=f"{name}: {benchmark.claim}", title_justify="left")
    for field in dataclasses.fields(benchmark.config):
        table.add_row(field.name, str(getattr(benchmark.config(), field.name)))
    console.print(table)


def run(name: tyro.conf.Positional[str], settings: Settings = (), out: Folder = FOLDER) -> None:
    """Run one benchmark: tables, a JSON file and the page of all results.

    Args:
      name: the benchmark, one of `list`.
    """
    console = Console()
    benchmark = _benchmark.find(name)
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
    if arguments and arguments[0] in _benchmark.names():
        arguments = ["run", *arguments]
    tyro.extras.subcommand_cli_from_dict(
        {"list": list_benchmarks, "run": run, "page": page},
        prog="python -m benchmarks",
        description="Benchmarks of subspace_jax beside its alternatives.",
        args=arguments,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
