"""The adapter of a run in the form of PyTorch's PEFT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import subspace_jax as sj
from subspace_jax.io import AdapterFileError, NameMap, NameRule

from ._backbone import Backbone
from ._problem import Problem

TASKS = {"text encoder": "SEQ_CLS", "image encoder": None, "language model": "SEQ_CLS"}


def peft_names(backbone: Backbone, *, classifies: bool) -> NameMap | None:
    """Returns what the parts of the model are called in PyTorch, with the head where there is one."""
    names = backbone.model.names
    if names is None or not classifies:
        return names
    if backbone.kind == "language model":
        # The classifier has the same decoder under the same name, and no head over tokens.
        rules = (dataclasses.replace(r, path=f"backbone/{r.path}") for r in names.rules if r.module != "lm_head")
        return NameMap((*rules, NameRule("classifier", "score")))
    config = backbone.model.config
    if backbone.kind == "text encoder":
        module = "bert" if config.padding_position is None else "roberta"
    else:
        module = "dinov2" if config.layer_scale else "vit"
    return names.inside("backbone", module) + NameMap((NameRule("classifier", "classifier"),))


def save_peft_folder(folder: Path, adapted: Any, problem: Problem, backbone: Backbone) -> str | None:
    """Writes PEFT's folder; returns why not where PEFT has no such form."""
    names = peft_names(backbone, classifies=problem.classifies)
    if names is None:
        return f"the names of {backbone.name} in PyTorch are not known"
    task = TASKS[backbone.kind] if problem.classifies else "CAUSAL_LM"
    options: dict[str, Any] = {"base_model": backbone.name, "task_type": task, "overwrite": True}
    try:
        sj.save_peft(folder, adapted, problem.params, names, **options)
    except AdapterFileError as error:
        return str(error)
    return None
