"""`subspace-jax list`: methods and models by name."""

from __future__ import annotations

import subspace_jax as sj
from subspace_jax.models import CARRIED

from ._console import console
from ._methods import ADAPTERS


def run(all: bool = False) -> None:
    """Show the methods and models that commands know by name.

    Args:
      all: show every method of the library too; those without a name here are used from Python.
    """
    from rich.table import Table

    table = Table("--method", "what it does", title="methods", title_justify="left")
    for name, adapter in ADAPTERS.items():
        table.add_row(name, adapter.summary)
    console().print(table)
    console().print(f"models: {', '.join(CARRIED)}")
    if all:
        table = Table("family", "method", "title", title="the whole catalogue", title_justify="left")
        for source in sj.catalogue():
            table.add_row(source.family, source.slug, source.title)
        console().print(table)
