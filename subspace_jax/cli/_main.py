"""Finds the command that is asked for, runs it, and turns a user's mistake into one message and exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from subspace_jax.errors import AssetMissingError, FetchError, SubspaceError

from ._errors import UserError

# Module and one line of help. A module has a function of its command's name, or a dict COMMANDS of functions by name.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "anomaly": ("subspace_jax.cli.anomaly", "finds what is unusual in images, from a few normal ones"),
    "cluster": ("subspace_jax.cli.cluster", "groups images or features that lie near subspaces, without labels"),
}

USAGE = "usage: subspace-jax COMMAND ... [--debug]\n\nAdapt pretrained models to your own data.\n\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `subspace-jax`.

    Args:
      arguments: in place of those of the process.

    Raises:
      SystemExit: always at a mistake of the user, with code 2; with `--debug` the traceback is shown instead.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return
    if given[0] not in COMMANDS:
        _refuse(f"subspace-jax: there is no command {given[0]!r}.{_nearest(given[0])}")
    try:
        _run(given[0], given[1:])
    except (UserError, SubspaceError, AssetMissingError, FetchError) as error:
        if debug:
            raise
        _refuse(f"subspace-jax {given[0]}: {error}")


def _run(name: str, arguments: Sequence[str]) -> None:
    try:
        import tyro
    except ImportError as error:
        raise UserError("the command line needs its extra: pip install 'subspace-jax[cli]'") from error
    module, summary = COMMANDS[name]
    loaded = importlib.import_module(module)
    program = f"subspace-jax {name}"
    functions: dict[str, Callable[..., Any]] | None = getattr(loaded, "COMMANDS", None)
    if functions is not None:
        tyro.extras.subcommand_cli_from_dict(functions, prog=program, description=summary, args=list(arguments))
    else:
        tyro.cli(getattr(loaded, name.replace("-", "_")), prog=program, args=list(arguments))


def _overview() -> str:
    width = max((len(name) for name in COMMANDS), default=0)
    rows = (f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return USAGE + "\n".join(["commands:", *rows, "", "subspace-jax COMMAND --help tells the options of one."])


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(COMMANDS) or 'none yet'}."


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)
