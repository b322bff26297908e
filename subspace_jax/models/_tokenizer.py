"""Tokenizers of the pretrained models, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How texts are cut into words, by the name that a GGUF file has for it; None is single digits, then GPT-2's way.
PRE_TOKENIZERS: Mapping[str, str | None] = {
    "smollm": None,
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
}


def tokenizers_library() -> Any:
    """Returns the `tokenizers` package, or says how to install it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "text models need the 'tokenizers' package; install it with: pip install 'subspace-jax[text]'"
        ) from error
    return tokenizers


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Args:
        path: the file.

    Returns:
        The tokenizer, without padding or truncation of its own; see `encode_texts`.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the file does not hold a tokenizer.
    """
    library = tokenizers_library()
    text = Path(path).read_text(encoding="utf8")
    try:
        tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path}: no readable tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Builds the byte-level BPE tokenizer that a GGUF file describes.

    Args:
        metadata: of the file.
        source: what error messages call the file.

    Returns:
        The tokenizer: byte-level BPE, control tokens as special ones.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the metadata describes another kind of tokenizer, or an inconsistent one.
    """
    library = tokenizers_library()
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: tokenizer {kind}; only the byte-level BPE 'gpt2' with {', '.join(PRE_TOKENIZERS)} is read"
        )
    tokens, merges, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type"))
    if not isinstance(tokens, list) or not isinstance(merges, list) or types is None:
        raise ValueError(f"{source}: tokenizer metadata lacks tokens, merges or token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if len(vocabulary) != len(tokens) or len(types) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{source}: tokenizer metadata has repeated tokens, missing types or malformed merges")
    try:
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{source}: tokenizer metadata is inconsistent: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(library, str(kind[1]))
    tokenizer.decoder = library.decoders.ByteLevel()
    for number in (_CONTROL, _USER_DEFINED):
        named = [token for token, kind in zip(tokens, types, strict=True) if kind == number]
        made = [library.AddedToken(token, special=number == _CONTROL, normalized=False) for token in named]
        (tokenizer.add_special_tokens if number == _CONTROL else tokenizer.add_tokens)(made)
    return tokenizer


def _pre_tokenizer(library: Any, name: str) -> Any:
    pattern = PRE_TOKENIZERS[name]
    bytes_of = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        first = library.pre_tokenizers.Digits(individual_digits=True)
    else:
        first = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
    return library.pre_tokenizers.Sequence([first, bytes_of])


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    *,
    pad_token: int = 0,
    pad_left: bool = False,
    special_tokens: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids of a batch, all of one length so that a compiled step has one shape only.

    Args:
        tokenizer: from a loader.
        texts: the batch.
        length: texts are cut or padded to this many tokens.
        pad_token: id at padded places.
        pad_left: pad in front, as decoding needs it.
        special_tokens: add those that the tokenizer adds by itself, such as `[CLS]` and `[SEP]`.

    Returns:
        `(tokens, mask)`: int32 `[batch, length]`, bool `[batch, length]` true at real tokens. A cut
        text keeps its last special token.

    Raises:
        ValueError: a single string in place of a batch, or a length below one.
    """
    if isinstance(texts, str) or length < 1:
        raise ValueError(
            f"encode_texts: texts={type(texts).__name__}, {length=}; expected a list of texts, length >= 1"
        )
    # Work on a copy: truncation is a setting of the tokenizer, and the caller's must not change.
    tokenizer = tokenizers_library().Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    tokens = np.full((len(texts), length), pad_token, np.int32)
    mask = np.zeros((len(texts), length), bool)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=special_tokens)
    for row, encoding in enumerate(encodings):
        count = len(encoding.ids)
        place = slice(length - count, length) if pad_left else slice(0, count)
        tokens[row, place] = encoding.ids
        mask[row, place] = True
    return tokens, mask
