"""Builds the tokenizer of a GGUF file whose pieces have scores: SentencePiece's byte-pair encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._tokenizer import tokenizers_library

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"  # how pieces write a space


def scored_merges(tokens: Sequence[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """Returns the merges that pieces with scores stand for, the first to be made first.

    A pair is merged before another if the piece that it makes has the higher score.

    Args:
        tokens: the pieces.
        scores: of each.

    Example:
        >>> import numpy as np
        >>> scored_merges(["a", "b", "ab", "aba"], np.array([-9.0, -9.0, -1.0, -0.5]))
        [('ab', 'a'), ('a', 'b')]
    """
    rank = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for number in map(int, np.argsort(-np.asarray(scores), kind="stable")):
        token: str = tokens[number]
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def sentencepiece_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Builds the tokenizer that a GGUF file of the kind `llama` describes.

    Args:
        metadata: of the file.
        source: what error messages call the file.

    Returns:
        The tokenizer: byte-pair encoding with bytes for what no piece writes; it starts every text with the first
        token where the file says so.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the metadata describes another kind of tokenizer, or an inconsistent one.
    """
    library = tokenizers_library()
    tokens, scores, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    if metadata.get("tokenizer.ggml.model") != "llama" or not isinstance(tokens, list):
        raise ValueError(f"{source}: tokenizer {metadata.get('tokenizer.ggml.model')!r}; expected 'llama' with pieces")
    if scores is None or types is None or not len(tokens) == len(scores) == len(types) == len(set(tokens)):
        raise ValueError(f"{source}: tokenizer metadata has repeated pieces, or pieces without score or type")
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(f"{source}: a tokenizer that puts a space before every text is not served")
    special = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    ordinary = np.where(np.isin(np.asarray(types), (_CONTROL, _USER_DEFINED)), -np.inf, np.asarray(scores))
    # Pieces for single bytes, `<0x0A>`, are written whole and never merged.
    whole = {token for token in tokens if token.startswith("<0x") and token.endswith(">")}
    merges = [pair for pair in scored_merges(tokens, ordinary) if whole.isdisjoint(pair)]
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = library.models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = library.decoders.Sequence(
        [library.decoders.Replace(_SPACE, " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    )
    for special_kind in (True, False):
        added = [tokens[i] for i in special if (types[i] == _CONTROL) == special_kind]
        made = [library.AddedToken(token, special=special_kind, normalized=False) for token in added]
        (tokenizer.add_special_tokens if special_kind else tokenizer.add_tokens)(made)
    first = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", False) and first is not None:
        name = tokens[int(first)]
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, int(first))]
        )
    return tokenizer
