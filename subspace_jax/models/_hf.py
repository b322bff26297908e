"""Loads a model's folder as Hugging Face's library writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import WeightFileError
from subspace_jax.io import ManifestError, TensorFiles, import_tensors

from ._bert import Bert
from ._clip import Clip
from ._hf_config import Described, describe_model
from ._hf_float8 import SCALES, dequantize_float8, split_scales
from ._llama import Llama
from ._pretrained import PretrainedModel, TextFormat, override_config
from ._tokenizer import load_tokenizer

_FREE = ("scan_layers", "remat", "dtype", "param_dtype", "dropout")
Place = Callable[[str, np.ndarray], Any]


def load_hf(folder: str | Path, *, place: Place | None = None, **overrides: Any) -> PretrainedModel:
    """Loads a folder with `config.json` and safetensors, whole or in shards.

    Served are Llama (SmolLM2 too), Mistral, Qwen 2 and 3, Gemma 3 (text), BERT, RoBERTa, ViT, DINOv2 and CLIP. A model
    with a head of pretraining or of a task is loaded without it; a language model keeps its head over tokens.

    Args:
        folder: of the model, on this machine.
        place: called with the path and the NumPy array of each parameter, one at a time; what it returns stands in
            the tree. `lambda path, array: jax.device_put(array, shardings[path])` puts a model onto a mesh without
            ever holding it whole. The default device if None.
        **overrides: `scan_layers`, `remat`, `dtype`, `param_dtype`, and `dropout` of a text encoder.

    Returns:
        The model, with its names in PyTorch and, of a language model, what its texts begin and end with.

    Raises:
        WeightFileError: a kind of model or an entry of `config.json` that is not served; tensors that are missing,
            left over, misshapen or not finite; a tokenizer of another model.
        AdapterFileError: a file is missing, cut or of two versions.

    Example:
        >>> import jax.numpy as jnp
        >>> from subspace_jax.models import load_hf
        >>> model = load_hf("models/Qwen3-0.6B", scan_layers=True, dtype=jnp.bfloat16)  # doctest: +SKIP
    """
    folder = Path(folder)
    entries = _json(folder / "config.json")
    if not entries:
        raise WeightFileError(f"{folder}: holds no config.json; give the folder of a model.")
    described = describe_model(entries, str(folder / "config.json"))
    free = [name for name in _FREE if hasattr(described.config, name)]
    config = override_config(described.config, overrides, tuple(free))
    module = described.module(config)
    params = _read(folder, described, module, config, place)
    tokenizer = folder / "tokenizer.json"
    return PretrainedModel(
        module,
        params,
        config,
        functools.partial(_checked_tokenizer, tokenizer, config.vocab_size) if tokenizer.exists() else None,
        described.names,
        _text_format(folder, entries) if isinstance(module, Llama) else None,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WeightFileError(f"{path}: holds {type(found).__name__}; expected an object of entries.")
    return found


def _samples(module: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if isinstance(module, Llama | Bert):
        return (tokens,)
    side = module.config.patch_size * (module.config.position_grid if isinstance(module, Clip) else 1)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return (tokens, images) if isinstance(module, Clip) else (images,)


def _read(folder: Path, described: Described, module: Any, config: Any, place: Place | None) -> Any:
    like = jax.eval_shape(module.init, jax.random.key(0), *_samples(module))["params"]
    files = TensorFiles(folder)
    kept, scales = split_scales(_named(files.shapes, described))

    def put(path: str, array: np.ndarray) -> Any:
        if not np.isfinite(array.astype(np.float32)).all():
            raise WeightFileError(f"{folder}: {path}: holds NaN or infinity; the file is damaged.")
        array = array.astype(jnp.dtype(config.param_dtype))
        return jnp.asarray(array) if place is None else place(path, array)

    def read(name: str) -> np.ndarray:
        tensor = files.read(kept[name])
        if name in scales:
            scale = files.read(scales[name])
            return dequantize_float8(tensor, scale, described.float8_block, f"{folder}: tensor {kept[name]!r}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize == 1:
            raise WeightFileError(
                f"{folder}: tensor {kept[name]!r} is {tensor.dtype} without a scale beside it; expected float32, "
                f"float16 or bfloat16, or float8 with {' or '.join(ending[1:] for ending in SCALES)}."
            )
        return tensor

    try:
        shapes = {name: files.shapes[theirs] for name, theirs in kept.items()}
        params, used = import_tensors(read, shapes, like, described.file_names, place=put)
    except ManifestError as error:
        raise WeightFileError(f"{folder}: {error}") from error
    rest = sorted((kept.keys() | scales.keys()) - used - {"lm_head.weight"})
    if rest:
        raise WeightFileError(
            f"{folder}: {len(rest)} tensors are of no use to this model: {', '.join(rest[:5])}. Does config.json "
            "belong to these files?"
        )
    _check_tied(files, kept, config)
    return params


def _named(shapes: Mapping[str, Any], described: Described) -> dict[str, str]:
    """The files' names by the modules' names; a head beside a prefixed model is left out."""
    prefix = described.prefix
    prefixed = bool(prefix) and any(name.startswith(prefix) for name in shapes)
    kept = {}
    for name in shapes:
        if name.endswith(described.dropped):
            continue
        if prefixed and not name.startswith(prefix):
            continue
        kept[name.removeprefix(prefix) if prefixed else name] = name
    return kept


def _check_tied(files: TensorFiles, kept: Mapping[str, str], config: Any) -> None:
    """A head that config.json calls tied must be the embedding's table, or the model would compute with another one."""
    if getattr(config, "tie_embeddings", False) and "lm_head.weight" in kept:
        head, table = (files.read(kept[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if head.shape != table.shape or not np.array_equal(head.view(np.uint8), table.view(np.uint8)):
            raise WeightFileError(
                f"{files.folder}: config.json says tie_word_embeddings, and lm_head.weight is another table than "
                "model.embed_tokens.weight. One of the two is wrong."
            )


def _checked_tokenizer(path: Path, rows: int) -> Any:
    tokenizer = load_tokenizer(path)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= rows:
        raise WeightFileError(
            f"{path}: its ids go up to {highest}, and the embedding table has {rows} rows; JAX would take the last row "
            "for those above. The tokenizer belongs to another model."
        )
    return tokenizer


def _text_format(folder: Path, entries: Mapping[str, Any]) -> TextFormat:
    """First and last tokens and template, of the files that have a say in them."""
    generation, told = _json(folder / "generation_config.json"), _json(folder / "tokenizer_config.json")
    ends = generation.get("eos_token_id", entries.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (value := told.get(name)) is not None
    }
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.exists() else told.get("chat_template")
    if isinstance(source, list):
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    bos = entries.get("bos_token_id")
    return TextFormat(tuple(map(int, ends)), bos if _adds_bos(folder, told, bos) else None, source, special)


def _adds_bos(folder: Path, told: Mapping[str, Any], bos: int | None) -> bool:
    """Whether texts begin with the first token: as the tokenizer itself does it, or as its settings say."""
    file = folder / "tokenizer.json"
    if bos is None:
        return False
    if file.exists():
        return load_tokenizer(file).encode("", add_special_tokens=True).ids[:1] == [bos]
    return bool(told.get("add_bos_token", False))
