"""What the command lines of experiments and benchmarks share: lists by family, settings, and finding by name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments.runner._registry import find_module, modules

Settings = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="set",
        help="Settings as key=value, lists with commas: --set steps=100 seeds=0,1. `list NAME` shows the keys.",
    ),
]


def entry(package: ModuleType, name: str) -> Any:
    """Returns what a public module of a package offers: its `EXPERIMENT` or its `BENCHMARK`.

    Args:
      package: `experiments` or `benchmarks`.
      name: the module's own name.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    kind = package.__name__.removesuffix("s")
    return getattr(find_module(name, package, kind), kind.upper())


def list_entries(package: ModuleType, name: str | None, console: Console) -> None:
    """Prints all entries of a package by family with their claims, or one with its settings."""
    if name is None:
        _list_all(package, console)
        return
    found = entry(package, name)
    console.print(f"[bold]{name}[/bold]: {found.claim}\n")
    table = Table("setting", "default", title="--set setting=value", title_justify="left")
    for field in dataclasses.fields(found.config):
        table.add_row(field.name, repr(getattr(found.config(), field.name)))
    console.print(table)


def _list_all(package: ModuleType, console: Console) -> None:
    table = Table(
        "family", "name", "what it shows", title=f"python -m {package.__name__} run NAME", title_justify="left"
    )
    last = None
    for family, name in by_family(package):
        if last is not None and family != last:
            table.add_section()
        table.add_row("" if family == last else family.replace("_", " "), name, entry(package, name).claim)
        last = family
    console.print(table)


def by_family(package: ModuleType) -> list[tuple[str, str]]:
    """Returns the family and name of every entry of a package, those that compare many methods first."""
    depth = package.__name__.count(".") + 2
    found = [
        (module.split(".")[depth - 1] if module.count(".") >= depth else "overview", name)
        for name, module in modules(package).items()
    ]
    return sorted(found, key=lambda pair: (pair[0] != "overview", *pair))


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


def run_commands(
    package: ModuleType, commands: Mapping[str, Callable[..., Any]], description: str, arguments: Sequence[str] | None
) -> None:
    """Runs a command line; a name that does not exist ends it with one line that tells the nearest."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given.count("--set") > 1:
        sys.exit("--set is given more than once, of which the last alone would count: --set key=value key=value.")
    try:
        tyro.extras.subcommand_cli_from_dict(
            dict(commands), prog=f"python -m {package.__name__}", description=description, args=given
        )
    except KeyError as error:
        sys.exit(str(error.args[0]))
