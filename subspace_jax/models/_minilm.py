"""MiniLM-L6: a pretrained sentence encoder (Wang and others, 2020)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from subspace_jax.io import bert_names

from ._bert import Bert, BertConfig
from ._finish import finish_params
from ._pretrained import (
    PretrainedModel,
    TensorRule,
    WeightFileError,
    assemble_params,
    checked_depth,
    locate,
    override_config,
)
from ._tokenizer import load_tokenizer

_ASSET = "minilm"
_FREE = ("num_layers", "dropout", "scan_layers", "remat", "dtype", "param_dtype")
# A buffer, and the head of the pretraining task: sentence vectors are the mean of the hidden states.
_IGNORABLE = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})


def bert_rules(config: BertConfig, keep: int) -> dict[str, TensorRule]:
    """Returns rules for a BERT file in PyTorch's names.

    Args:
        config: what the file holds.
        keep: number of layers to load; the others are checked and dropped.

    Returns:
        Rule by tensor name; linear weights are `(out, in)` in the file and are transposed.
    """
    width, hidden = config.width, config.mlp_width
    rules: dict[str, TensorRule] = {}

    def norm(name: str, path: str | None) -> None:
        for theirs, ours in (("weight", "scale"), ("bias", "bias")):
            rules[f"{name}.{theirs}"] = TensorRule((width,), path and f"{path}/{ours}")

    def linear(name: str, path: str | None, rows: int, columns: int) -> None:
        rules[f"{name}.weight"] = TensorRule((columns, rows), path and f"{path}/kernel", np.transpose)
        rules[f"{name}.bias"] = TensorRule((columns,), path and f"{path}/bias")

    for table, rows in (
        ("word", config.vocab_size),
        ("position", config.max_positions),
        ("token_type", config.num_token_types),
    ):
        rules[f"embeddings.{table}_embeddings.weight"] = TensorRule((rows, width), f"embeddings/{table}/embedding")
    norm("embeddings.LayerNorm", "embeddings/norm")
    for layer in range(config.num_layers):
        theirs = f"encoder.layer.{layer}"
        ours = f"encoder/layer_{layer}" if layer < keep else None
        for part in ("query", "key", "value"):
            linear(f"{theirs}.attention.self.{part}", ours and f"{ours}/attention/{part}", width, width)
        linear(f"{theirs}.attention.output.dense", ours and f"{ours}/attention/output", width, width)
        norm(f"{theirs}.attention.output.LayerNorm", ours and f"{ours}/attention_norm")
        linear(f"{theirs}.intermediate.dense", ours and f"{ours}/mlp/fc1", width, hidden)
        linear(f"{theirs}.output.dense", ours and f"{ours}/mlp/fc2", hidden, width)
        norm(f"{theirs}.output.LayerNorm", ours and f"{ours}/mlp_norm")
    return rules


def load_minilm(path: str | Path | None = None, **overrides: Any) -> PretrainedModel:
    """Loads MiniLM-L6, a `Bert` of 6 layers of width 384 trained to embed sentences.

    A sentence's vector is `mean_pool` of the hidden states over its mask, scaled to length one.

    Args:
        path: a `model.safetensors` with its `tokenizer.json` beside it; the carried one by default.
        **overrides: `num_layers` (the first ones are kept), `dropout`, `scan_layers`, `remat`, `dtype`,
          `param_dtype` of `BertConfig`.

    Returns:
        The model; its tokenizer needs the `text` extra.

    Raises:
        AssetMissingError: no path is given and the carrier package is absent.
        WeightFileError: the file is not a safetensors file, or a tensor is missing, unexpected or misshapen.
        ValueError: an override that the weights decide.

    Source: Wenhui Wang and others, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers", 2020.

    Example:
        >>> from subspace_jax.models import encode_texts, load_minilm, mean_pool
        >>> model = load_minilm()  # doctest: +SKIP
        >>> tokens, mask = encode_texts(model.load_tokenizer(), ["A text."], 32)  # doctest: +SKIP
        >>> hidden = model.module.apply({"params": model.params}, tokens, mask)  # doctest: +SKIP
        >>> mean_pool(hidden, mask).shape  # doctest: +SKIP
        (1, 384)
    """
    full = BertConfig()
    keep = checked_depth(overrides.get("num_layers"), full.num_layers, "num_layers")
    config = override_config(full, overrides, _FREE)
    file = locate(path, _ASSET, "model/model.safetensors")
    params = assemble_params(
        read_safetensors(file), bert_rules(full, keep), str(file), ignorable=_IGNORABLE.__contains__
    )
    tokenizer = functools.partial(load_tokenizer, file.with_name("tokenizer.json"))
    return PretrainedModel(Bert(config), finish_params(params, config), config, tokenizer, bert_names())


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file, with the file named in the error."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise WeightFileError(f"{file}: no readable safetensors file: {error}") from error
