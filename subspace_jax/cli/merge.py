"""`subspace-jax merge`: one adapter into its model's weights, or several runs, adapters or models into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

import subspace_jax as sj

from ._console import console
from ._errors import UserError
from ._export import check_export, read_merged, write_merged
from ._files import write_json
from ._merge_report import leaf_report, leaf_table
from ._merge_sources import from_files, from_runs

# The function, and what it calls the strength of the merged change.
METHODS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "average": (sj.merging.average, None),
    "task-arithmetic": (sj.merging.task_arithmetic, "weights"),
    "ties": (sj.merging.ties, "scale"),
    "tsv-m": (sj.merging.tsv_m, "scale"),
    "iso-c": (sj.merging.iso_c, "scale"),
}


def run(
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    out: Path,
    base: str | None = None,
    method: str = "task-arithmetic",
    strength: float | None = None,
) -> None:
    """Merge adapters or models into plain weights that other programs load, and say what each leaf got.

    Args:
      sources: folders of finished runs of one model; or with --base folders of PEFT or Hugging Face, and safetensors
        files. Several become one.
      out: folder to write; it must not exist. merge.json in it says what each leaf got.
      base: the language model that files were made from, named as for finetune; runs know theirs.
      method: how several are merged: average, task-arithmetic, ties, tsv-m, iso-c.
      strength: of the merged change, where the method has one; the method's own by default.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: choose from {', '.join(METHODS)}.")
    if not sources or out.exists():
        raise UserError(f"expected at least one source, and a folder --out {out} that does not exist.")
    function, name = METHODS[method]
    if strength is not None and name is None:
        raise UserError(f"--strength {strength:g}: {method} has none; leave it out.")
    loaded = from_runs(sources) if base is None else from_files(sources, base)
    params, merged = loaded.problem.params, loaded.trees[0]
    if len(loaded.trees) > 1:
        options = {} if strength is None or name is None else {name: strength}
        merged = function(loaded.trees, params, **options)
    merged = sj.merge(merged)
    write_merged(out, merged, loaded.backbone, loaded.problem)
    found = read_merged(out, params, loaded.backbone, loaded.problem)
    share = check_export(found, merged, params, loaded.apply, loaded.batch, str(out))
    records = leaf_report(params, loaded.trees, merged)
    settings = {"base": loaded.backbone.name, "sources": loaded.names, "method": method, "strength": strength}
    write_json(out / "merge.json", {**settings, "leaves": records})
    console().print(leaf_table(records, len(loaded.trees)))
    console().print(f"{out}: {len(loaded.trees)} merged, written and read back (differs by {share:.1e})")
