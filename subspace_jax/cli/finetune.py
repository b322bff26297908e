"""`subspace-jax finetune`: a user's own data, a pretrained model, one method or several."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import subspace_jax as sj

from ._backbone import Backbone, load_backbone
from ._console import console
from ._errors import UserError
from ._examples import Prepared
from ._files import write_json, write_lines
from ._methods import find_adapter, method_rules
from ._options import FinetuneOptions, parse_options
from ._peft import save_peft_folder
from ._prepare import prepare_data
from ._problem import Problem, make_problem
from ._progress import RunProgress
from ._run_folder import check_folder, draw_losses, settings_of, write_how_to
from ._show import show_comparison, show_data, show_estimates, show_example, show_leaves
from ._train import Job, Result, resident_bytes


def command(program: str, arguments: Sequence[str]) -> None:
    """Runs the command with its arguments."""
    finetune(parse_options(list(arguments), program))


def finetune(options: FinetuneOptions) -> dict[str, dict[str, float]]:
    """Fine-tunes a pretrained model on a user's data.

    Everything is read and checked before anything is written; see `FinetuneOptions`.

    Args:
      options: of the run.

    Returns:
      For every method the metrics of the state that was kept.

    Raises:
      UserError: options or data that cannot be used.
      DataError: rows that cannot be used; each is named.
    """
    options.check()
    for method in options.methods():
        find_adapter(method)
    output = console()
    backbone = load_backbone(options.model, options.dtype, packed=options.packed())
    prepared = prepare_data(options, backbone)
    problem = make_problem(backbone, prepared.classes, options.seed, prepared.train.take(np.arange(1), 1))
    show_data(output, prepared)
    show_example(output, prepared, backbone)
    metrics: dict[str, dict[str, float]] = {}
    several = len(options.methods()) > 1
    for method in options.methods():
        rules = method_rules(
            method, options.rank, options.alpha, backbone, classifies=bool(prepared.classes), target=options.target
        )
        job = Job(problem, options, method, rules, prepared.train, prepared.validation, backbone.dtype)
        folder = options.out / method if several else options.out
        settings = settings_of(
            options, method, {"train": prepared.train.digest(), "validation": prepared.validation.digest()}
        )
        if not options.dry_run:
            check_folder(folder, settings, resume=options.resume)
        show_leaves(output, method, job)
        state, began = job.start(), time.perf_counter()
        estimates = job.compile(state)
        show_estimates(output, job, estimates)
        if options.dry_run:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        _record_data(folder, prepared)
        with RunProgress(job.steps, method) as progress:
            result = job.run(state, folder, progress.on_step, progress.on_evaluation)
        if result.adapted is None:
            raise UserError(
                f"stopped after step {result.step} of {job.steps}; go on with the same command and --resume."
            )
        took = {"memory_bytes": resident_bytes(), "seconds": time.perf_counter() - began}
        costs = {"estimates": estimates, "took": took}
        metrics[method] = _finish(folder, settings, job, result, backbone, problem, costs, options)
        output.print(f"{method}: {_line(metrics[method])}  in {folder}")
    if options.dry_run:
        output.print("Nothing was written: --dry-run.")
    if several and metrics:
        write_json(options.out / "comparison.json", metrics)
        show_comparison(output, metrics)
    return metrics


def _line(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "step")


def _record_data(folder: Path, prepared: Prepared) -> None:
    write_json(folder / "data.json", prepared.report)
    records = [
        {"split": split, **detail}
        for split, part in (("train", prepared.train), ("validation", prepared.validation))
        for detail in part.details
    ]
    write_lines(folder / "examples.jsonl", records)


def _finish(
    folder: Path,
    settings: Mapping[str, Any],
    job: Job,
    result: Result,
    backbone: Backbone,
    problem: Problem,
    costs: Mapping[str, Mapping[str, float]],
    options: FinetuneOptions,
) -> dict[str, float]:
    """Writes what a finished run leaves behind; returns the metrics of the kept state."""
    found = job.evaluate(result.adapted)
    metrics = {"step": result.best["step"], **found.metrics}
    write_lines(folder / "predictions.jsonl", found.predictions)
    write_lines(folder / "evaluations.jsonl", result.evaluations)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    draw_losses(folder, steps, result.evaluations)
    portable = _portable(result.adapted, problem.params)
    sj.save_adapter(folder / "adapter.safetensors", portable, base=problem.params)
    peft = save_peft_folder(folder / "peft", portable, problem, backbone)
    if options.merged:
        from ._export import write_merged

        write_merged(folder / "merged", sj.merge(result.adapted), backbone, problem)
    summary = sj.summary(result.adapted)
    write_json(
        folder / "metrics.json",
        {
            **metrics,
            "steps": result.step,
            "trained_values": summary.trainable,
            "adapter_bytes": (folder / "adapter.safetensors").stat().st_size,
            **costs,
            "peft": peft or "written",
        },
    )
    write_how_to(folder, settings, metrics, peft=peft is None, writes=not problem.classifies)
    return metrics


def _portable(adapted: Any, base: Any) -> Any:
    """Residual starts as the LoRA that does the same to the untouched weights, so that files stay small."""
    try:
        return sj.to_lora(adapted, base)
    except sj.errors.SubspaceError:
        return adapted
