"""Finds the command that is asked for, runs it, and turns a user's mistake into one message and exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from subspace_jax.errors import AssetMissingError, FetchError, SubspaceError

from ._errors import UserError

# Module and one line of help. A module has `command(program, arguments)`, a dict COMMANDS of functions by name, or a
# function `run` whose parameters are the options.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "finetune": ("subspace_jax.cli.finetune", "fine-tune a pretrained model on your own data"),
    "evaluate": ("subspace_jax.cli.evaluate", "judge a run's adapter on other data"),
    "generate": ("subspace_jax.cli.generate", "continue prompts with a run's adapter"),
    "chat": ("subspace_jax.cli.chat", "talk with a run's adapter"),
    "export": ("subspace_jax.cli.export", "write a run's adapter for PEFT or the whole model for Hugging Face"),
    "merge": ("subspace_jax.cli.merge", "merge one run's adapter into its weights, or several runs into one model"),
    "explain": ("subspace_jax.cli.explain", "tell what a run's method made of every leaf, and why"),
    "list": ("subspace_jax.cli.list_methods", "show the methods and models by name"),
    "doctor": ("subspace_jax.cli.doctor", "show versions, devices and what is missing"),
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
    except (UserError, SubspaceError, AssetMissingError, FetchError, ImportError) as error:
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
    if hasattr(loaded, "command"):
        loaded.command(program, arguments)
    elif functions is not None:
        tyro.extras.subcommand_cli_from_dict(functions, prog=program, description=summary, args=list(arguments))
    else:
        tyro.cli(loaded.run, prog=program, args=list(arguments))


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
