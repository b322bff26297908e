"""`subspace-jax merge`: one run's adapter into its weights, or several runs' into one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

import subspace_jax as sj

from ._console import console
from ._errors import UserError
from ._export import check_export, probe, read_merged, write_merged
from ._load_run import Run, load_run

# The function, and what it calls the strength of the merged change.
METHODS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "average": (sj.merging.average, None),
    "task-arithmetic": (sj.merging.task_arithmetic, "weights"),
    "ties": (sj.merging.ties, "scale"),
    "tsv-m": (sj.merging.tsv_m, "scale"),
    "iso-c": (sj.merging.iso_c, "scale"),
}


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    out: Path,
    method: str = "task-arithmetic",
    strength: float | None = None,
) -> None:
    """Merge adapters into plain weights that other programs load.

    Args:
      runs: folders of finished runs of one model; several become one.
      out: folder to write; it must not exist.
      method: how several are merged: average, task-arithmetic, ties, tsv-m, iso-c.
      strength: of the merged change, where the method has one; the method's own by default.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: choose from {', '.join(METHODS)}.")
    if not runs or out.exists():
        raise UserError(f"expected at least one run, and a folder --out {out} that does not exist.")
    loaded = [load_run(folder) for folder in runs]
    first = loaded[0]
    for other in loaded[1:]:
        _check_same(first, other)
    function, name = METHODS[method]
    if strength is not None and name is None:
        raise UserError(f"--strength {strength:g}: {method} has none; leave it out.")
    merged = first.adapted
    if len(loaded) > 1:
        options = {} if strength is None or name is None else {name: strength}
        merged = function([one.adapted for one in loaded], first.problem.params, **options)
    merged = sj.merge(merged)
    write_merged(out, merged, first.backbone, first.problem)
    found = read_merged(out, first.problem.params, first.backbone, first.problem)
    share = check_export(found, merged, first.problem.params, first.apply, probe(first), str(out))
    console().print(f"{out}: {len(loaded)} merged, written and read back (differs by {share:.1e})")


def _check_same(first: Run, other: Run) -> None:
    if first.problem.classifies and first.options.seed != other.options.seed:
        raise UserError(
            f"{other.folder}: its classifier's head started from seed {other.options.seed}, that of {first.folder} "
            f"from {first.options.seed}. Heads can be merged where they started alike."
        )
    if (first.backbone.name, first.problem.classes) != (other.backbone.name, other.problem.classes):
        raise UserError(
            f"{other.folder}: a run of {other.backbone.name} with classes {other.problem.classes}; {first.folder} is "
            f"of {first.backbone.name} with {first.problem.classes}. Only runs of one model can be merged."
        )
