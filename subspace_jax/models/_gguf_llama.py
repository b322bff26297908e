"""What a GGUF file says of a decoder like `Llama`: its configuration, its tensors, its first and last tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._llama_config import LlamaConfig
from ._pretrained import TextFormat

# Entries that every such architecture has, by field of the configuration.
GGUF_NUMBERS = {
    "width": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "mlp_width": "feed_forward_length",
    "max_positions": "context_length",
    "epsilon": "attention.layer_norm_rms_epsilon",
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
