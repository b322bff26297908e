"""Finds experiments by name; a module is imported only when its experiment is asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

import experiments
from experiments._experiment import Experiment


def names() -> list[str]:
    """Returns the names of all experiments: the public modules of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(experiments.__path__) if not m.name.startswith("_"))


def find(name: str) -> Experiment:
    """Returns an experiment.

    Args:
      name: its name.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    known = names()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise KeyError(f"No experiment is called {name!r}; nearest: {near}. `python -m experiments list` shows all.")
    return importlib.import_module(f"experiments.{name}").EXPERIMENT
