"""The folder of a run: evidence that a program can read, and what is needed to use the adapter again."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import subspace_jax as sj
from subspace_jax.io import replacing

from ._errors import UserError
from ._files import read_json
from ._options import FinetuneOptions

FORMAT = 1
# Options that a resumed run may change: they decide nothing about what is learned.
FREE = ("resume", "dry_run", "out", "merged", "compare", "method")


def settings_of(options: FinetuneOptions, method: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Returns what decides a run: options, data and versions."""
    chosen = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
    }
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "format": FORMAT,
        "method": method,
        "options": chosen,
        "data": dict(digests),
        "versions": {"subspace_jax": sj.__version__, **versions, "python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
    }


def check_folder(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Checks that a run can have its folder: it is new, or holds the run to go on with. Nothing is written.

    Raises:
      UserError: it holds something and `resume` was not asked for; or it was started with other data or settings.
    """
    recorded = folder / "settings.json"
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"--out {folder}: the folder is not empty. Name another one, or go on with its run by --resume."
            )
        return
    if not recorded.exists():
        raise UserError(f"--resume: there is no run in {folder}; leave --resume out to start one.")
    before = read_json(recorded)
    changed = [
        f"--{name.replace('_', '-')}: it was {before['options'].get(name)!r}, now {value!r}"
        for name, value in settings["options"].items()
        if name not in FREE and before["options"].get(name) != value
    ]
    changed += [
        f"the {part} examples are others"
        for part, hashed in settings["data"].items()
        if before["data"].get(part) != hashed
    ]
    if before["method"] != settings["method"]:
        changed.append(f"--method: it was {before['method']!r}, now {settings['method']!r}")
    if changed:
        raise UserError(f"--resume: the run in {folder} was started differently:", changed)


HOW_TO = """# A run of `subspace-jax finetune`

Model `{model}`, method `{method}`, best validation loss {loss:.4f} after step {step}.

| file | what it is |
|---|---|
| `settings.json` | options, hashes of the data, versions, devices |
| `data.json` | counts, ignored columns, row numbers of the split, rows that were cut |
| `examples.jsonl` | every example: its row, its tokens, and which of them are labels |
| `steps.jsonl`, `evaluations.jsonl` | loss, rate and gradient norm of every step; metrics of every evaluation |
| `metrics.json`, `predictions.jsonl` | what the kept state reaches on the validation examples, and each of them |
| `loss.png` | both losses over the steps |
| `adapter.safetensors` | the adapter, for this library |
{peft_row}
Use it:

    subspace-jax evaluate {folder} more.jsonl
{generate}
In Python:

    import subspace_jax as sj
    from subspace_jax.cli import load_run

    run = load_run("{folder}")
    logits = run.apply(run.adapted, batch)
{peft}"""

PEFT = """
In PyTorch:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "{folder}/peft")
"""


def write_how_to(
    folder: Path, settings: Mapping[str, Any], best: Mapping[str, float], *, peft: bool, writes: bool
) -> None:
    """Writes README.md: what every file is, and how the adapter is used here and in PyTorch."""
    text = HOW_TO.format(
        model=settings["options"]["model"],
        method=settings["method"],
        loss=best["loss"],
        step=int(best["step"]),
        folder=folder,
        peft_row="| `peft/` | the same in the form of PyTorch's PEFT |\n" if peft else "",
        generate=f"    subspace-jax generate {folder} 'A prompt'\n    subspace-jax chat {folder}\n" if writes else "",
        peft=PEFT.format(folder=folder) if peft else "",
    )
    with replacing(folder / "README.md") as file:
        file.write_text(text, encoding="utf-8")


def draw_losses(folder: Path, steps: Iterable[Mapping[str, float]], evaluations: Iterable[Mapping[str, float]]) -> None:
    """Draws both losses over the steps into `loss.png`."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, evaluations = list(steps), list(evaluations)
    axes.plot(
        [s["step"] for s in steps], [s["loss"] for s in steps], lw=1, color="#8899aa", label="training, each step"
    )
    axes.plot(
        [e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", color="#c0392b", label="validation"
    )
    axes.set(xlabel="optimizer step", ylabel="loss over labels")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "loss.png", dpi=120)
