"""Finds experiments by name; a module is imported only when its experiment is asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

import experiments
from experiments._experiment import Experiment


def names(package: ModuleType = experiments) -> list[str]:
    """Returns the names of all experiments: the public modules of the package."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find_module(name: str, package: ModuleType, kind: str) -> ModuleType:
    """Returns the public module of a package.

    Args:
      name: its name.
      package: where it is.
      kind: what its modules are, for the message.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    known = names(package)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise KeyError(f"No {kind} is called {name!r}; nearest: {near}. `python -m {package.__name__} list` shows all.")
    return importlib.import_module(f"{package.__name__}.{name}")


def find(name: str) -> Experiment:
    """Returns an experiment.

    Args:
      name: its name.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    return find_module(name, experiments, "experiment").EXPERIMENT
