"""`subspace-jax evaluate`: what a run's adapter reaches on other data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from subspace_jax.data import check_form, find_form, read_rows

from ._console import console
from ._encode import encode_examples
from ._errors import UserError
from ._evaluate import evaluate_model
from ._files import write_json, write_lines
from ._images import read_image_examples
from ._load_run import load_run


def run(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[Path, tyro.conf.Positional],
    /,
    out: Path | None = None,
    batch: int = 16,
) -> None:
    """Judge a run's adapter on a file (or a folder of images) of the form that it was trained on.

    Args:
      run: folder of a finished run.
      data: examples to judge by, all of them.
      out: also write metrics.json and predictions.jsonl to this folder.
      batch: examples at a time; it does not change the result.
    """
    loaded = load_run(run)
    if loaded.backbone.kind == "image encoder":
        columns = loaded.options.column_names()
        examples = read_image_examples(data, loaded.data["image_size"], loaded.problem.classes, columns)
    else:
        columns = loaded.options.column_names()
        rows = read_rows(data)
        form = find_form(rows, columns)
        if form != loaded.data["form"]:
            raise UserError(f"{data}: rows of the form {form!r}; the run was trained on {loaded.data['form']!r}.")
        options = dataclasses.replace(loaded.options, pack=False, max_length=loaded.data["max_length"])
        examples = encode_examples(
            options, loaded.backbone, rows, check_form(rows, form, columns), loaded.problem.classes
        )
    found = evaluate_model(loaded.problem, loaded.adapted, examples, batch)
    for name, value in found.metrics.items():
        console().print(f"{name:<12}{value:.4f}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", {"run": str(run), "data": str(data), **found.metrics})
        write_lines(out / "predictions.jsonl", found.predictions)
