"""Pieces with scores become a tokenizer that merges the best pair first."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax.models._sentencepiece import sentencepiece_from_gguf

pytest.importorskip("tokenizers")
SPACE = "\u2581"


def metadata(pieces, scores, **entries):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [3, 3, 3, 3, *[6] * 256, *[1] * len(pieces)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *pieces],
        "tokenizer.ggml.scores": np.array([*[-1000.0] * 4, *[0.0] * 256, *scores], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    } | entries


def best_first(text, scores):
    """The definition: merge the neighbors whose piece has the highest score, the leftmost of equal ones."""
    parts = list(text.replace(" ", SPACE))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=40)
@given(
    st.lists(st.text("ab" + SPACE, min_size=2, max_size=4), min_size=1, max_size=8, unique=True),
    st.text("ab ", min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_texts_are_cut_as_by_the_definition(pieces, text, random):
    pieces = ["a", "b", SPACE, *pieces]
    order = random.sample(range(len(pieces)), len(pieces))
    scores = [-float(number) for number in order]
    tokenizer = sentencepiece_from_gguf(metadata(pieces, scores), "file")
    found = tokenizer.encode(text, add_special_tokens=False)
    assert found.tokens == best_first(text, dict(zip(pieces, scores, strict=True)))
    assert tokenizer.decode(found.ids) == text


def test_bytes_specials_and_the_first_token():
    tokenizer = sentencepiece_from_gguf(metadata(["a", SPACE], [-1.0, -2.0]), "file")
    assert tokenizer.encode("a é<eos>").tokens == ["<bos>", "a", SPACE, "<0xC3>", "<0xA9>", "<eos>"]
    ids = tokenizer.encode("a é", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "a é"
    bare = sentencepiece_from_gguf(metadata(["a"], [-1.0], **{"tokenizer.ggml.add_bos_token": False}), "file")
    assert bare.encode("a").tokens == ["a"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, "'gpt2'"),
        ({"tokenizer.ggml.scores": np.zeros(3)}, "without score"),
        ({"tokenizer.ggml.add_space_prefix": True}, "a space before"),
    ],
)
def test_other_tokenizers_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        sentencepiece_from_gguf(metadata(["a"], [-1.0], **entries), "file")
