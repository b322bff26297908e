"""`subspace-jax explain`: what a run's method made of every leaf, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

import subspace_jax as sj
from subspace_jax.core import is_weight, leaves_with_paths, matches

from ._console import console
from ._errors import UserError
from ._load_run import load_run
from ._methods import method_rules


def run(run: Annotated[Path, tyro.conf.Positional], path: Annotated[str, tyro.conf.Positional] = "**", /) -> None:
    """Tell of every leaf which rule took it, how the model uses it, and what learns.

    Args:
      run: folder of a finished run.
      path: pattern of the leaves to explain, such as "**/query/kernel".
    """
    loaded = load_run(run)
    options, output = loaded.options, console()
    rules = method_rules(
        loaded.settings["method"],
        options.rank,
        options.alpha,
        loaded.backbone,
        classifies=loaded.problem.classifies,
        target=options.target,
    )
    leaves = dict(leaves_with_paths(loaded.adapted))
    chosen = [name for name in leaves if matches(path, name)]
    if not chosen:
        raise UserError(f"{path}: no leaf has such a path; some are {', '.join(list(leaves)[:4])}.")
    for name in chosen:
        leaf, role = leaves[name], loaded.problem.roles.get(name)
        fits = [rule for rule in rules if matches(rule, name)]
        output.print(f"{name}  {tuple(leaf.shape)} {leaf.dtype}", markup=False)
        output.print(
            f"  the model uses it as: {role.kind if role else 'nothing; no gradient reaches it'}", markup=False
        )
        if is_weight(leaf):
            learned = sj.summary({"leaf": leaf}).trainable
            output.print(f"  taken by {fits[0]!r}: {leaf.method or type(leaf).__name__}, {learned:,} values learn")
        else:
            output.print(
                "  no rule fits, so it stays as it was" if not fits else f"  {fits[0]!r} fits, yet it is plain"
            )
        if len(fits) > 1:
            output.print(f"  also fitting, shadowed by the first: {', '.join(map(repr, fits[1:]))}", markup=False)
