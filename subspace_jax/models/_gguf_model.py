"""Loads a decoder from a GGUF file, dequantized or in the file's own blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace_jax.io import llama_names

from ._finish import finish_params
from ._gguf import GgufFile, read_gguf
from ._gguf_llama import GGUF_NUMBERS, gguf_config, gguf_text_format
from ._gguf_rules import gguf_rules, pack_tensor
from ._gguf_tensor import GgufTensor
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._pretrained import PretrainedModel, TensorRule, assemble_params, checked_depth, override_config
from ._rotary import RopeScaling
from ._sentencepiece import sentencepiece_from_gguf
from ._tokenizer import tokenizer_from_gguf

_FREE = ("scan_layers", "remat", "dtype", "param_dtype")
# Every sixth layer of Gemma 3 attends to all tokens; the others have the window and frequencies of their own.
_GLOBAL_EVERY, _WINDOW_ROPE_BASE = 6, 10000.0
# Gemma 3 of this depth (27B) scales its scores by the width of a head as the width has it, not as heads are.
_GEMMA3_LARGEST = 62


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What an architecture's name decides.

    Attributes:
        options: fields of the configuration.
        permuted: rows of queries and keys are stored for models that rotate neighbors.
        numbers: entries that it needs beside those of all, by field.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    permuted: bool = False
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)


_HEAD = {"head_size": "attention.key_length"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(permuted=True),
    "qwen2": Architecture({"qkv_bias": True}),
    "qwen3": Architecture({"qk_norm": True}, numbers=_HEAD),
    "gemma3": Architecture(
        {
            "window_rope_base": _WINDOW_ROPE_BASE,
            "qk_norm": True,
            "post_norms": True,
            "unit_offset": True,
            "scale_embeddings": True,
            "activation": "gelu_tanh",
        },
        numbers=_HEAD | {"window": "attention.sliding_window", "rope_base": "rope.freq_base"},
    ),
}


def load_gguf(
    path: str | Path,
    num_layers: int | None = None,
    *,
    packed: bool = False,
    only: str | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Loads a decoder from a GGUF file of the architecture `llama` (Mistral too), `qwen2`, `qwen3` or `gemma3`.

    Args:
        path: the file.
        num_layers: number of layers to keep, the first ones; all by default.
        packed: keep quantized matrices in the file's blocks, as `Packed` weights: run the model by `with_adapters`,
            and adapt it by `sj.qlora`. Layers that are stacked may mix kinds of blocks.
        only: the architecture that the file must be of; any of the four by default.
        **overrides: `scan_layers`, `remat`, `dtype`, `param_dtype` of `LlamaConfig`.

    Returns:
        The model; its tokenizer needs the `text` extra. A file without an output table ties it to the embeddings'.

    Raises:
        WeightFileError: the file lacks, exceeds or misshapes a tensor.
        ValueError: the file is no readable GGUF file of such a decoder, or an override is of a field that the weights
            decide.

    Example:
        >>> from subspace_jax.models import load_gguf
        >>> model = load_gguf("Qwen3-0.6B-Q4_K_M.gguf", packed=True, scan_layers=True)  # doctest: +SKIP
    """
    gguf, source = read_gguf(path), str(path)
    full = describe_gguf(gguf, source, only)
    keep = checked_depth(num_layers, full.num_layers, "num_layers")
    layers = None if full.window_layers is None else full.window_layers[:keep]
    kept = {"num_layers": keep, "window_layers": layers, **overrides}
    config = override_config(full, kept, ("num_layers", "window_layers", *_FREE))
    permuted = ARCHITECTURES[gguf.metadata["general.architecture"]].permuted
    pack = pack_tensor(config.param_dtype, source)

    def store(tensor: GgufTensor, rule: TensorRule) -> Any:
        gguf.release()  # what was read before this tensor
        return pack(tensor, rule) if packed else None

    rules = gguf_rules(full, keep, permuted=permuted)
    params = assemble_params(gguf.tensors, rules, source, read=GgufTensor.dequantize, store=store)
    params = finish_params(params, config, gguf.release)
    gguf.release()
    names = llama_names(tie_embeddings=config.tie_embeddings, post_norms=config.post_norms)
    # By the file, not by its tables: those of a large vocabulary take tens of megabytes.
    tokenizer = functools.partial(gguf_tokenizer, path)
    form = gguf_text_format(gguf.metadata)
    return PretrainedModel(Llama(config), params, config, tokenizer, names, form, Path(path))


def gguf_tokenizer(path: str | Path) -> Any:
    """Returns the tokenizer that a GGUF file describes, of either kind that is served.

    Args:
        path: the file.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the file describes another kind of tokenizer, or an inconsistent one.
    """
    metadata = read_gguf(path).metadata
    scored = metadata.get("tokenizer.ggml.model") == "llama"
    return (sentencepiece_from_gguf if scored else tokenizer_from_gguf)(metadata, str(path))


def describe_gguf(gguf: GgufFile, source: str, only: str | None = None) -> LlamaConfig:
    """Returns the configuration that a GGUF file states.

    Args:
        gguf: the file.
        source: what error messages call it.
        only: the architecture that it must be of.

    Raises:
        ValueError: another architecture, a missing or impossible entry, or one that our module cannot serve.
    """
    metadata, tensors = gguf.metadata, gguf.tensors
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES or only not in (None, name):
        raise ValueError(f"{source}: architecture {name!r}; only {only or ', '.join(ARCHITECTURES)!r} is read")
    known = ARCHITECTURES[name]
    table = tensors.get("token_embd.weight")
    options = {
        "vocab_size": table.shape[0] if table else 1,
        "tie_embeddings": "output.weight" not in tensors,
        "rope_base": 10000.0,
        "rope_scaling": _rope_scaling(metadata, name, source),
        **known.options,
    }
    options["qkv_bias"] = options.get("qkv_bias", "blk.0.attn_q.bias" in tensors)
    options["output_bias"] = "blk.0.attn_output.bias" in tensors
    for field, key in {**_HEAD, "rope_base": "rope.freq_base"}.items():
        if isinstance(metadata.get(f"{name}.{key}"), int | float):
            options[field] = metadata[f"{name}.{key}"]
    numbers = GGUF_NUMBERS | dict(known.numbers)
    config = gguf_config(metadata, name, numbers, source, **{k: v for k, v in options.items() if k not in numbers})
    _check(metadata, name, config, source)
    return _gemma3(config) if name == "gemma3" else config


def _gemma3(config: LlamaConfig) -> LlamaConfig:
    near = tuple(bool((layer + 1) % _GLOBAL_EVERY) for layer in range(config.num_layers))
    scale = (config.width / config.num_heads) ** -0.5 if config.num_layers == _GEMMA3_LARGEST else None
    return dataclasses.replace(config, window_layers=near, attention_scale=scale)


def _rope_scaling(metadata: Mapping[str, Any], name: str, source: str) -> RopeScaling | None:
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"{source}: rope scaling {kind!r}; only 'linear' is read")
    return RopeScaling("linear", float(metadata[f"{name}.rope.scaling.factor"]))


def _check(metadata: Mapping[str, Any], name: str, config: LlamaConfig, source: str) -> None:
    """Refuses entries that ask for what the module does not do."""
    rotated = metadata.get(f"{name}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ValueError(f"{source}: {rotated} rotated dimensions of {config.head_dim}; only all of them is read")
    values = metadata.get(f"{name}.attention.value_length", config.head_dim)
    if values != config.head_dim:
        raise ValueError(f"{source}: values of {values} and keys of {config.head_dim} dimensions; expected one size")
    if metadata.get(f"{name}.expert_count", 0):
        raise ValueError(f"{source}: {name}.expert_count={metadata[f'{name}.expert_count']}; experts are not read")
    rows = metadata.get(f"{name}.vocab_size", config.vocab_size)
    if rows != config.vocab_size:
        raise ValueError(f"{source}: {name}.vocab_size={rows}, and the embedding table has {config.vocab_size} rows")
    if name != "gemma3" and metadata.get(f"{name}.attention.sliding_window", 0):
        raise ValueError(f"{source}: {name}.attention.sliding_window is not read for this architecture")
