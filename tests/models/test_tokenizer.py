import sys

import numpy as np
import pytest

from subspace_jax.models import encode_texts, load_tokenizer
from subspace_jax.models._tokenizer import tokenizer_from_gguf


@pytest.fixture
def words():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def test_texts_are_padded_and_cut(words):
    tokens, mask = encode_texts(words, ["a", "a b c a b", ""], 4)
    assert tokens.tolist() == [[1, 4, 2, 0], [1, 4, 5, 2], [1, 2, 0, 0]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4, [True, True, False, False]]
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    assert words.truncation is None


def test_padding_on_the_left_without_special_tokens(words):
    tokens, mask = encode_texts(words, ["a b", "c"], 3, pad_token=9, pad_left=True, special_tokens=False)
    assert tokens.tolist() == [[9, 4, 5], [9, 9, 6]]
    assert mask.tolist() == [[False, True, True], [False, False, True]]


def test_a_string_is_no_batch(words):
    with pytest.raises(ValueError, match="list of texts"):
        encode_texts(words, "a b", 3)


def test_a_saved_tokenizer_comes_back_without_its_padding(words, tmp_path):
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("b").ids == [1, 5, 2]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_the_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"subspace-jax\[text\]"):
        load_tokenizer(tmp_path / "tokenizer.json")


def gguf_metadata(**changes):
    tokens = ["<end>", "a", "b", "1", "2", "ab", "Ġ"]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": ["a b"],
        "token_type": [3] + [1] * 6,
    }
    fields.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def test_byte_level_pairs_digits_and_special_tokens():
    pytest.importorskip("tokenizers")
    tokenizer = tokenizer_from_gguf(gguf_metadata(), "f")
    assert tokenizer.encode("ab 12<end>b").tokens == ["ab", "Ġ", "1", "2", "<end>", "b"]
    assert tokenizer.decode([5, 6, 3, 0], skip_special_tokens=False) == "ab 1<end>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "byte-level"),
        ({"pre": "other"}, "byte-level"),
        ({"merges": None}, "lacks"),
        ({"tokens": ["a"] * 7}, "repeated"),
        ({"token_type": [1]}, "missing types"),
        ({"merges": ["a b c"]}, "malformed"),
        ({"merges": ["a z"]}, "inconsistent"),
    ],
)
def test_inconsistent_metadata_is_refused(changes, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(gguf_metadata(**changes), "f")


@pytest.mark.parametrize(("name", "digits"), [("qwen2", ["1", "2", "3", "4"]), ("llama-bpe", ["123", "4"])])
def test_a_gguf_file_says_how_texts_are_cut_into_words(name, digits):
    tokens = [*(chr(ord("!") + i) for i in range(94)), "\u0120", "\u010a", "12", "123", "\u0120a", "<u>"]
    merges = ["1 2", "12 3", "\u0120 a"]
    types = [1] * (len(tokens) - 1) + [4]
    entries = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges, "token_type": types}
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in entries.items()}, "m.gguf")
    found = tokenizer.encode("It's a 1234<u>").tokens
    assert found == ["I", "t", "'", "s", "\u0120a", "\u0120", *digits, "<u>"]
    assert tokenizer.decode(tokenizer.encode("It's a 1234\nB").ids) == "It's a 1234\nB"
