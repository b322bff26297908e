"""The options of `subspace-jax finetune`, from the command line or from a settings file."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ._errors import UserError


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a pretrained model on your own data.

    The data is a table (.jsonl, .csv, .parquet) with columns text and label (classification), prompt and completion,
    messages (conversations) or text alone; of images a folder with one folder for each class, or a table with columns
    image (a file, as seen from the table's folder) and label.

    Attributes:
      data: file of examples, or folder of images.
      model: minilm, vit-s14, smollm2, gemma3-270m, hf:FOLDER with a model's config.json and safetensors, or gguf:FILE.
      method: how it is adapted; `subspace-jax list` shows the methods.
      compare: several methods on the same split, such as --compare lora dora oft; in place of --method.
      rank: rank of low-rank adapters.
      alpha: their scale is alpha / rank; twice the rank by default.
      target: pattern of the leaves that are adapted; every kernel of the model's layers by default.
      out: folder of the run; it must be new, or hold a run to go on with.
      columns: names of your columns where they differ, such as --columns text=review label=stars.
      validation: file of validation examples; otherwise a part of the data is held out.
      validation_fraction: that part; stratified by label, with exact copies on one side.
      max_length: most tokens of an example; by default 512, or what the model can take.
      cut: side that is cut off longer ones, or refuse.
      template: chat template of conversations: chatml, plain, or a file in Jinja's language; the model's own otherwise.
      pack: several short texts in one row, kept apart; for language models.
      epochs: passes over the training data.
      steps: optimizer steps in all; in place of --epochs.
      batch: examples (packed: rows) that an optimizer step sees.
      accumulate: micro-batches that a step is cut into, to save memory; divides --batch.
      learning_rate: its peak; by default the method's own.
      schedule: how it falls after the warm-up.
      warmup: share of the steps in which it rises.
      weight_decay: of AdamW.
      evaluate_every: optimizer steps between evaluations; once an epoch by default.
      patience: stop after so many evaluations without a lower validation loss; the best state is kept either way.
      dtype: of the frozen weights and the computation; auto is bfloat16 where the device has it.
      image_size: side of the square that images are cut to, in pixels.
      seed: of the split, the order, the head and the adapter.
      merged: also write the model's weights with the adapter merged in.
      dry_run: stop before training, after all checks and estimates; nothing is written.
      resume: go on with the run in --out, which must have been started with the same data and settings.
    """

    data: Annotated[Path, tyro.conf.Positional]
    model: str = "minilm"
    method: str = "lora"
    compare: tuple[str, ...] = ()
    rank: int = 16
    alpha: float | None = None
    target: str | None = None
    out: Path = Path("run")
    columns: tuple[str, ...] = ()
    validation: Path | None = None
    validation_fraction: float = 0.1
    max_length: int | None = None
    cut: Literal["right", "left", "refuse"] = "right"
    template: str | None = None
    pack: bool = True
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 16
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    evaluate_every: int | None = None
    patience: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    image_size: int = 112
    seed: int = 0
    merged: bool = False
    dry_run: bool = False
    resume: bool = False

    def methods(self) -> tuple[str, ...]:
        """Returns the methods to run: those of `compare`, split at commas, or the one."""
        return tuple(name for item in self.compare for name in item.split(",") if name) or (self.method,)

    def packed(self) -> bool:
        """Returns whether the frozen weights of a GGUF file stay in its blocks: where every method stands on them."""
        return all(method == "qlora" for method in self.methods())

    def column_names(self) -> dict[str, str]:
        """Returns the file's name of every column that is called otherwise, by ours.

        Raises:
          UserError: an entry is not of the form ours=theirs, or names no column that we know.
        """
        pairs = [entry.partition("=") for entry in self.columns]
        known = ("text", "label", "image", "prompt", "completion", "messages")
        bad = [f"{ours}{equals}{theirs}" for ours, equals, theirs in pairs if not theirs or ours not in known]
        if bad:
            raise UserError(f"--columns {' '.join(bad)}: expected OURS=YOURS with OURS of {', '.join(known)}.")
        return {ours: theirs for ours, _, theirs in pairs}

    def check(self) -> None:
        """Refuses numbers that no run can have.

        Raises:
          UserError: names the option, what came and what was expected.
        """
        positive = ("rank", "batch", "accumulate", "image_size", "epochs")
        optional = ("alpha", "steps", "max_length", "learning_rate", "evaluate_every", "patience")
        for name in (*positive, *optional):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a positive number.")
        if self.batch % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate}: expected a divisor of --batch {self.batch}.")
        if not 0 <= self.warmup < 1 or not 0 < self.validation_fraction < 1:
            raise UserError(
                f"--warmup {self.warmup:g}, --validation-fraction {self.validation_fraction:g}: expected shares, from "
                "0 to below 1 and between 0 and 1."
            )


def parse_options(arguments: list[str], program: str) -> FinetuneOptions:
    """Reads the options; those of `--settings FILE` (JSON or TOML) hold where the command line says nothing.

    Args:
      arguments: of the command.
      program: how usage calls it.

    Raises:
      UserError: the settings file cannot be read, or names an option that there is not.
      SystemExit: the command line is wrong, or asks for help.
    """
    given = list(arguments)
    settings: dict[str, Any] = {}
    if "--settings" in given:
        place = given.index("--settings")
        if place + 1 == len(given):
            raise UserError("--settings: expected a file.")
        settings = _read_settings(Path(given[place + 1]))
        del given[place : place + 2]
    found: dict[str, Any] = {"default": FinetuneOptions(**{"data": tyro.MISSING, **settings})} if settings else {}
    purpose = str(FinetuneOptions.__doc__).partition("Attributes:")[0].strip()
    hint = "--settings FILE reads options from a JSON or TOML file; the command line goes before it."
    return tyro.cli(FinetuneOptions, prog=program, args=given, description=f"{purpose}\n\n{hint}", **found)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--settings {path}: cannot be read: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(FinetuneOptions)}
    found = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = sorted(found.keys() - fields.keys())
    if unknown:
        raise UserError(f"--settings {path}: there are no options {', '.join(unknown)}.")
    return {name: _typed(name, value) for name, value in found.items()}


def options_from(recorded: Mapping[str, Any]) -> FinetuneOptions:
    """Returns options of what JSON or TOML can say; names that are no options are passed over."""
    known = {field.name for field in dataclasses.fields(FinetuneOptions)}
    return FinetuneOptions(**{name: _typed(name, value) for name, value in recorded.items() if name in known})


def _typed(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in ("data", "out", "validation"):
        return Path(value)
    return tuple(value) if name in ("compare", "columns") else value
