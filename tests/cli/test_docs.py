"""Every command line in the documents is one that the command understands."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from subspace_jax import cli
from subspace_jax.cli import _main

ROOT = Path(__file__).parents[2]
LINES = sorted(
    {
        line.strip()
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for line in block.splitlines()
        if line.strip().startswith("subspace-jax ")
    }
)


class RanError(Exception):
    """The command line was understood, and its function was called."""


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_documents_is_understood(line, monkeypatch):
    words = shlex.split(line.partition("  #")[0])[1:]
    module = importlib.import_module(_main.COMMANDS[words[0]][0])

    if hasattr(module, "command"):
        monkeypatch.setattr(module, "finetune", stopped(module.finetune))
    elif hasattr(module, "COMMANDS"):
        monkeypatch.setattr(module, "COMMANDS", {name: stopped(f) for name, f in module.COMMANDS.items()})
    else:
        monkeypatch.setattr(module, "run", stopped(module.run))
    with pytest.raises(RanError):
        cli.main(words)


def stopped(function):
    """A function of the same options that only tells that it was called."""

    @functools.wraps(function)
    def stop(*arguments, **options):
        raise RanError

    return stop


def test_there_are_such_lines():
    assert len(LINES) > 10
