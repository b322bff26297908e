"""Finds experiments by name; a module is imported only when its experiment is asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

import experiments
from experiments.runner._experiment import Experiment

SHARED = ("results", "runner", "tasks")


def modules(package: ModuleType = experiments) -> dict[str, str]:
    """Returns the full module name of every public module of a package and of its folders, by its own name.

    Folders in `SHARED` hold what the others stand on and have no entries.
    """
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = info.name.rsplit(".", 1)[-1]
        if name.startswith("_") or name in SHARED:
            continue
        if info.ispkg:
            found |= modules(importlib.import_module(info.name))
        else:
            found[name] = info.name
    return found


def names(package: ModuleType = experiments) -> list[str]:
    """Returns the names of all experiments, whatever folder they are in."""
    return sorted(modules(package))


def find_module(name: str, package: ModuleType, kind: str) -> ModuleType:
    """Returns the public module of a package.

    Args:
      name: its name.
      package: where it is.
      kind: what its modules are, for the message.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    known = modules(package)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise KeyError(f"No {kind} is called {name!r}; nearest: {near}. `python -m {package.__name__} list` shows all.")
    return importlib.import_module(known[name])


def find(name: str) -> Experiment:
    """Returns an experiment.

    Args:
      name: its name.

    Raises:
      KeyError: there is none of this name; the message has the nearest ones.
    """
    return find_module(name, experiments, "experiment").EXPERIMENT
