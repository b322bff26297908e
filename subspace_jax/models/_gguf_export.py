"""Writes a decoder as a GGUF file, with the tokenizer of the file or folder that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from subspace_jax.core import is_weight, leaves_with_paths

from ._gguf import read_gguf
from ._gguf_model import ARCHITECTURES
from ._gguf_rules import gguf_rules
from ._gguf_write import write_gguf
from ._layers import unstack_layers
from ._llama import Llama
from ._pretrained import PretrainedModel

Precision = Literal["f16", "f32"]
_FILE_TYPES = {"f32": 0, "f16": 1}
_LARGEST = 65504.0


class GgufExportError(ValueError):
    """The format cannot say what the model is."""


def export_gguf(path: str | Path, params: Any, model: PretrainedModel, *, precision: Precision = "f16") -> None:
    """Writes the parameters of a decoder that was read from a GGUF file as another one.

    Metadata and tokenizer are those of the file that the model came from, so that token ids mean the same. Matrices
    are float16 (or float32), vectors float32: nothing is rounded to fewer bits, whatever the file's own blocks were.

    Args:
        path: of the new file; it must not be the model's own.
        params: ordinary arrays, unrolled or stacked, such as `sj.merge(adapted)`.
        model: what they belong to, all its layers; see `load_gguf`.
        precision: of the matrices.

    Raises:
        GgufExportError: the model is no decoder of a GGUF file, has fewer layers than its file, `params` hold stand-in
            weights, or a value is no float16. Nothing is written.

    Example:
        >>> import subspace_jax as sj
        >>> from subspace_jax.models import export_gguf, load_smollm2
        >>> model = load_smollm2(packed=True)  # doctest: +SKIP
        >>> export_gguf("tuned.gguf", sj.merge(adapted), model)  # doctest: +SKIP
    """
    if not isinstance(model.module, Llama) or model.source is None:
        raise GgufExportError(
            f"{path}: the model is not from a GGUF file, whose tables of tokens a new file needs. Write it for Hugging "
            "Face and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    if Path(path).resolve() == model.source.resolve():
        raise GgufExportError(f"{path}: this is the model's own file; name another one.")
    metadata = read_gguf(model.source).metadata
    architecture = metadata["general.architecture"]
    if metadata[f"{architecture}.block_count"] != model.config.num_layers:
        raise GgufExportError(
            f"{path}: {model.config.num_layers} layers are left of {metadata[f'{architecture}.block_count']}; load the "
            "whole model to write it."
        )
    rules = gguf_rules(model.config, model.config.num_layers, permuted=ARCHITECTURES[architecture].permuted)
    leaves = dict(leaves_with_paths(unstack_layers(params)))
    _check_leaves(leaves, {rule.path for rule in rules.values()}, str(path))
    tensors = {}
    for name, rule in rules.items():
        array = rule.restore(np.asarray(leaves[str(rule.path)], np.float32))
        tensors[name] = _stored(name, array, precision, str(path))
    entries = {key: value for key, value in metadata.items() if key != "general.quantization_version"}
    write_gguf(path, entries | {"general.file_type": _FILE_TYPES[precision]}, tensors)


def _check_leaves(leaves: Mapping[str, Any], expected: set[str | None], path: str) -> None:
    adapted = [name for name, leaf in leaves.items() if is_weight(leaf)]
    if adapted:
        raise GgufExportError(f"{path}: {adapted[0]} is a stand-in weight; merge() the tree first.")
    different = sorted(leaves.keys() ^ {str(name) for name in expected})
    if different:
        raise GgufExportError(f"{path}: the format has no place for {different[:3]}, or needs it.")


def _stored(name: str, array: np.ndarray, precision: Precision, path: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise GgufExportError(f"{path}: {name} holds NaN or infinity.")
    if array.ndim == 1 or precision == "f32":
        return np.ascontiguousarray(array)
    largest = float(np.abs(array).max())
    if largest > _LARGEST:
        raise GgufExportError(f"{path}: {name} holds {largest:.3g}, above what float16 can hold; write float32.")
    return array.astype(np.float16)
