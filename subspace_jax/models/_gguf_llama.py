"""What a GGUF file says of a decoder like `Llama`: its configuration, its tensors, its first and last tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._llama_config import LlamaConfig
from ._pretrained import TensorRule, TextFormat

# Entries that every such architecture has, by field of the configuration.
GGUF_NUMBERS = {
    "width": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "mlp_width": "feed_forward_length",
    "max_positions": "context_length",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "rope_base": "rope.freq_base",
}


def gguf_config(
    metadata: Mapping[str, Any], architecture: str, numbers: Mapping[str, str], source: str, **options: Any
) -> LlamaConfig:
    """Returns the configuration that a GGUF file states.

    Args:
        metadata: of the file.
        architecture: that the file must be of.
        numbers: entry of the architecture's metadata by field of the configuration.
        source: what error messages call the file.
        **options: fields that the architecture decides.

    Raises:
        ValueError: another architecture, a missing or impossible entry.
    """
    if metadata.get("general.architecture") != architecture:
        raise ValueError(
            f"{source}: architecture {metadata.get('general.architecture')!r}; only {architecture!r} is read"
        )
    found = {field: metadata.get(f"{architecture}.{key}") for field, key in numbers.items()}
    missing = [f"{architecture}.{numbers[field]}" for field, v in found.items() if not isinstance(v, int | float)]
    if missing:
        raise ValueError(f"{source}: metadata lacks the numbers {missing}")
    try:
        return LlamaConfig(**{**found, **options})
    except ValueError as error:
        raise ValueError(f"{source}: impossible metadata: {error}") from error


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


def gguf_rules(config: LlamaConfig, keep: int, *, permuted: bool) -> dict[str, TensorRule]:
    """Returns rules for a GGUF file of a decoder with tied embeddings.

    Args:
        config: what the file holds; norms that multiply by `1 + scale` are stored with the one added.
        keep: number of layers to load; the others are checked and dropped.
        permuted: whether rows of queries and keys are stored in the order of `unpermute_rotary`.

    Returns:
        Rule by tensor name; matrices are `(out, in)` in the file.
    """
    width, hidden, size = config.width, config.mlp_width, config.head_dim
    query, key_value = config.num_heads, config.num_kv_heads

    def norm(array: np.ndarray) -> np.ndarray:
        return array - 1.0 if config.unit_offset else array

    def heads(count: int, *, rotated: bool = True) -> Callable[[np.ndarray], np.ndarray]:
        def convert(rows: np.ndarray) -> np.ndarray:
            return (unpermute_rotary(rows, count) if rotated and permuted else rows).T.reshape(width, count, size)

        return convert

    rules = {
        "token_embd.weight": TensorRule((config.vocab_size, width), "embedding/embedding"),
        "output_norm.weight": TensorRule((width,), "norm/scale", norm),
    }
    kernels = {
        "attn_q": ("attention/query", (query * size, width), heads(query)),
        "attn_k": ("attention/key", (key_value * size, width), heads(key_value)),
        "attn_v": ("attention/value", (key_value * size, width), heads(key_value, rotated=False)),
        "attn_output": ("attention/output", (width, query * size), lambda rows: rows.T.reshape(query, size, width)),
        "ffn_gate": ("mlp/gate", (hidden, width), np.transpose),
        "ffn_up": ("mlp/up", (hidden, width), np.transpose),
        "ffn_down": ("mlp/down", (width, hidden), np.transpose),
    }
    norms = {"attn_norm": ("attention_norm", width), "ffn_norm": ("mlp_norm", width)}
    if config.qk_norm:
        norms |= {f"attn_{name[0]}_norm": (f"attention/{name}_norm", size) for name in ("query", "key")}
    if config.post_norms:
        norms |= {"post_attention_norm": ("attention_post_norm", width), "post_ffw_norm": ("mlp_post_norm", width)}
    for layer in range(config.num_layers):
        ours = f"decoder/layer_{layer}" if layer < keep else None
        for name, (path, shape, convert) in kernels.items():
            rules[f"blk.{layer}.{name}.weight"] = TensorRule(shape, ours and f"{ours}/{path}/kernel", convert)
        for name, (path, features) in norms.items():
            rules[f"blk.{layer}.{name}.weight"] = TensorRule((features,), ours and f"{ours}/{path}/scale", norm)
    return rules
