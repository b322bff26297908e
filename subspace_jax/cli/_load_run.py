"""Loads a finished run again: its model, its adapter, and how its texts become tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import subspace_jax as sj
from subspace_jax.models import CausalEncoder

from ._backbone import Backbone, load_backbone
from ._encode import causal_encoder
from ._errors import UserError
from ._files import read_json
from ._options import FinetuneOptions, options_from
from ._problem import Batch, Problem, make_problem
from ._run_folder import FORMAT


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of `subspace-jax finetune`.

    Attributes:
      folder: of the run.
      settings: what decided it.
      backbone: the pretrained model.
      problem: model with head, and pretrained parameters.
      adapted: parameters with the trained adapter.
      apply: logits of parameters and batch.
      options: of the run.
      data: what its `data.json` says.
    """

    folder: Path
    settings: Mapping[str, Any]
    backbone: Backbone
    problem: Problem
    adapted: Any
    apply: Callable[[Any, Batch], Any]
    options: FinetuneOptions
    data: Mapping[str, Any]

    def encoder(self) -> CausalEncoder:
        """Returns how texts become tokens, as in training.

        Raises:
          UserError: the run trained a classifier.
        """
        if self.problem.classifies:
            raise UserError(f"{self.folder}: this run trained a classifier, which writes no text; use evaluate.")
        return causal_encoder(self.options, self.backbone, self.data["max_length"])


def load_run(folder: str | Path) -> Run:
    """Loads a run that has ended.

    Args:
      folder: the run's `--out`; of a comparison the folder of one of its methods.

    Raises:
      UserError: the folder holds no finished run.
      AdapterFileError: the adapter was made for other weights.
    """
    folder = Path(folder)
    settings, data = read_json(folder / "settings.json"), read_json(folder / "data.json")
    if settings.get("format") != FORMAT:
        raise UserError(f"{folder}: a run of format {settings.get('format')!r}; this version reads {FORMAT}.")
    if not (folder / "adapter.safetensors").exists():
        raise UserError(f"{folder}: the run has not ended; go on with it by `finetune ... --resume`.")
    options = options_from(settings["options"])
    backbone = load_backbone(options.model, options.dtype, packed=options.packed())
    classes = tuple(data.get("classes", ()))
    problem = make_problem(backbone, classes, options.seed, _sample(backbone, data, bool(classes)))
    adapted = sj.load_adapter(folder / "adapter.safetensors", problem.params)
    return Run(folder, settings, backbone, problem, adapted, sj.with_adapters(problem.logits), options, data)


def _sample(backbone: Backbone, data: Mapping[str, Any], classifies: bool) -> dict[str, np.ndarray]:
    """One empty batch, for the shapes."""
    if backbone.kind == "image encoder":
        side = data["image_size"]
        return {"images": np.zeros((1, side, side, 3), np.uint8)}
    tokens = np.zeros((1, 8), np.int32)
    return {"tokens": tokens, "mask": tokens > -1} if classifies else {"tokens": tokens, "segments": tokens + 1}
