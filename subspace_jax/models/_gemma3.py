"""Gemma 3 270M: a pretrained causal language model, read from a GGUF file in blocks of 4 to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subspace_jax.assets import GROUPS, join_parts

from ._gguf_model import load_gguf
from ._pretrained import PretrainedModel

ASSET = "gemma3-270m"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def load_gemma3(
    num_layers: int | None = None, path: str | Path | None = None, *, packed: bool = False, **overrides: Any
) -> PretrainedModel:
    """Loads Gemma 3 270M, a `Llama` of 18 layers of width 640, dequantized from blocks of 4 to 8 bits or in them.

    The weights are under the Gemma Terms of Use and are fetched only where they are asked for by name.

    Args:
        num_layers: number of layers to keep, the first ones; all by default.
        path: a GGUF file of Gemma 3; the carried one by default, joined from its four parts.
        packed: keep matrices in the file's blocks; see `load_gguf`.
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
    file = gemma3_file() if path is None else path
    return load_gguf(file, num_layers, packed=packed, only="gemma3", **overrides)


def gemma3_file() -> Path:
    """Returns the path of the packaged Gemma 3 GGUF file, joined from its four parts.

    Raises:
        AssetMissingError: the parts are absent; `python -m experiments fetch gemma3-270m`.
    """
    return join_parts(GROUPS[ASSET], ".part{:02}", f"{ASSET}/{_FILE}", _SHA256)
