"""Tiny models under names of their own, with a tokenizer of whole words, so that commands run in seconds."""

import contextlib
import functools
import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import cli
from subspace_jax.io import bert_names, dinov2_names, llama_names
from subspace_jax.models import (
    CARRIED,
    Bert,
    Llama,
    PretrainedModel,
    TextFormat,
    Vit,
    small_bert,
    small_llama,
    small_vit,
)

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tyro")

_SPECIAL = "<pad> <end> <bos> <unk> : \n user assistant system User Assistant"
_PLAIN = (
    "the film was good bad fine dull what is next one two three four five six seven eight nine ten a very not it and"
)
WORDS = [*_SPECIAL.split(" "), *_PLAIN.split(" ")]


def word_tokenizer():
    """Whole words and line breaks; `<...>` are special."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n|[^\s:]+|:"), "removed", invert=True)
    tokenizer.add_special_tokens([word for word in WORDS if word.startswith("<")])
    return tokenizer


def _params(module, config, sample):
    """Parameters of a configuration; as new arrays, because a run may donate its own."""
    return jax.tree.map(jnp.asarray, _params_once(module, config, sample.shape, sample.dtype))


@functools.cache
def _params_once(module, config, shape, dtype):
    params = jax.jit(module(config).init)(jax.random.key(3), jnp.ones(shape, dtype))["params"]
    # Large enough that an adapter has something to change.
    return jax.tree.map(lambda leaf: np.asarray(leaf) * (4.0 if leaf.ndim > 1 else 1.0), params)


QUICK = ("--batch", 8, "--rank", 2, "--learning-rate", 0.01)
TOKENS = jnp.ones((1, 4), jnp.int32)


def load_bert(**overrides):
    config = small_bert(vocab_size=len(WORDS), **overrides)
    return PretrainedModel(Bert(config), _params(Bert, config, TOKENS), config, word_tokenizer, bert_names())


def load_llama(bos_token=None, chat_template=None, **overrides):
    config = small_llama(vocab_size=len(WORDS), **overrides)
    special = {"eos_token": "<end>", "bos_token": "<bos>"}
    text = TextFormat((1,), bos_token, chat_template, special)
    return PretrainedModel(
        Llama(config), _params(Llama, config, TOKENS), config, word_tokenizer, llama_names(), text_format=text
    )


def load_vit(**overrides):
    config = small_vit(**overrides)
    params = _params(Vit, config, jnp.zeros((1, 12, 12, 3)))
    return PretrainedModel(Vit(config), params, config, names=dinov2_names())


@pytest.fixture(scope="session", autouse=True)
def _tiny_models():
    with pytest.MonkeyPatch.context() as patch:
        for name, loader in (("tiny-bert", load_bert), ("tiny-llama", load_llama), ("tiny-vit", load_vit)):
            patch.setitem(CARRIED, name, (loader, "minilm"))
        patch.setattr("subspace_jax.cli._backbone.is_available", lambda asset: True)
        yield


@pytest.fixture(scope="session")
def shell():
    """Runs a command line; returns its exit code and what it printed."""

    def run(*arguments):
        code, out, err = 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as ended:
                code = ended.code or 0
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture
def reviews(tmp_path):
    """Forty reviews with labels, as JSON lines."""
    return write_reviews(tmp_path)


def write_reviews(tmp_path):
    words = {"pos": ["good", "fine"], "neg": ["bad", "dull"]}
    lines = [
        {"text": f"the film was {words[label][i % 2]} {' '.join(WORDS[22 + i % 9 : 24 + i % 9])}", "label": label}
        for i in range(20)
        for label in words
    ]
    return write_lines(tmp_path / "reviews.jsonl", lines)


@pytest.fixture(scope="session")
def trained(shell, tmp_path_factory):
    """A finished run on reviews, and their file; nothing may write into them."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_reviews(folder)
    done = shell("finetune", data, "--model", "tiny-bert", "--out", folder / "run", "--epochs", 4, *QUICK)
    assert done.code == 0, done.err
    return folder / "run", data


@pytest.fixture(scope="session")
def talker(shell, tmp_path_factory):
    """A finished run on conversations, what it printed, and their file."""
    folder = tmp_path_factory.mktemp("talker")
    data = write_chats(folder)
    done = shell(
        "finetune", data, "--model", "tiny-llama", "--out", folder / "run", "--method", "full", "--batch", 4,
        "--accumulate", 2, "--steps", 300, "--evaluate-every", 150, "--learning-rate", 0.003, "--max-length", 48,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "run", done.out, data


def write_chats(tmp_path):
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = []
    for i in range(20):
        ask, answer = numbers[i % 9], numbers[i % 9 + 1]
        turns = [{"role": "user", "content": f"what is next {ask}"}, {"role": "assistant", "content": answer}]
        lines.append({"messages": turns * (1 + i % 2), "id": i})
    return write_lines(tmp_path / "chats.jsonl", lines)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
