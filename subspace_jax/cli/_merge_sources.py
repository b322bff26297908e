"""What `subspace-jax merge` takes: finished runs, or files that other programs wrote, with the model they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import subspace_jax as sj
from subspace_jax.io import ManifestError, NameMap, import_tensors, read_safetensors

from ._backbone import Backbone, load_backbone
from ._errors import UserError
from ._export import probe_of
from ._load_run import Run, load_run
from ._problem import Batch, Problem, make_problem


@dataclasses.dataclass(frozen=True)
class Sources:
    """Trees of one model that become one.

    Attributes:
      names: what each came from.
      trees: adapted trees or plain parameters, one of each.
      backbone: the model.
      problem: the model with its head and its pretrained parameters.
      apply: logits of parameters and batch.
      batch: arbitrary input on which two models can be compared.
    """

    names: tuple[str, ...]
    trees: list[Any]
    backbone: Backbone
    problem: Problem
    apply: Callable[[Any, Batch], Any]
    batch: Batch


def from_runs(folders: Sequence[Path]) -> Sources:
    """Loads finished runs of one model.

    Raises:
      UserError: a folder holds no finished run, or the runs are of different models or heads.
    """
    loaded = [load_run(folder) for folder in folders]
    first = loaded[0]
    for other in loaded[1:]:
        _check_same(first, other)
    trees = [one.adapted for one in loaded]
    batch = probe_of(first.backbone, first.problem, first.data.get("image_size", 0))
    return Sources(tuple(map(str, folders)), trees, first.backbone, first.problem, first.apply, batch)


def from_files(paths: Sequence[Path], base: str) -> Sources:
    """Loads adapters and whole models from files, onto the language model that they were made from.

    Args:
      paths: each a folder of PyTorch PEFT, a folder of Hugging Face's, or a safetensors file of either this library's
        adapters or whole weights by PyTorch's names.
      base: the model, as `--model` names it.

    Raises:
      UserError: the model is no language model, or a path holds none of these, or one of another model.
    """
    backbone = load_backbone(base)
    names = backbone.model.names
    if backbone.kind != "language model" or names is None:
        raise UserError(
            f"--base {base}: a {backbone.kind}. Files are merged for language models; for classifiers name the "
            "folders of finished runs, without --base."
        )
    tokens = np.zeros((1, 8), np.int32)
    problem = make_problem(backbone, (), 0, {"tokens": tokens, "segments": tokens + 1})
    trees = [_read(path, problem.params, names) for path in paths]
    apply, batch = sj.with_adapters(problem.logits), probe_of(backbone, problem)
    return Sources(tuple(map(str, paths)), trees, backbone, problem, apply, batch)


def _read(path: Path, params: Any, names: NameMap) -> Any:
    """The tree of one file or folder."""
    try:
        if (path / "adapter_config.json").exists():
            return sj.load_peft(path, params, names)
        if (path / "config.json").exists():
            stacked = load_backbone(f"hf:{path}").model.params
            _check_shapes(path, stacked, params)
            return stacked
        if path.suffix == ".safetensors" and path.is_file():
            tensors, metadata = read_safetensors(path)
            if any(key.startswith("subspace_jax") for key in metadata):
                return sj.load_adapter(path, params)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            return import_tensors(tensors.__getitem__, shapes, params, names)[0]
    except ManifestError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(
        f"{path}: expected a folder with adapter_config.json (PEFT) or config.json (Hugging Face), or a file of "
        "safetensors; runs of `finetune` are merged without --base."
    )


def _check_shapes(path: Path, found: Any, params: Any) -> None:
    """Refuses the weights of another model, by the first leaf that tells."""
    ours, theirs = (dict(sj.core.leaves_with_paths(tree)) for tree in (params, found))
    for name in [*ours, *theirs]:
        shapes = [tree[name].shape if name in tree else None for tree in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {name} is {shapes[0]} there and {shapes[1]} in --base: not the same model.")


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
