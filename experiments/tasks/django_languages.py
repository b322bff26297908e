"""Interface messages in several languages for a small encoder: masked tokens, and a task whose answers translate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.data import messages_by_application
from subspace_jax.models import Bert, encode_texts, load_minilm, mean_pool

LENGTH = 24
HIDDEN = 3  # tokens of a message, about 15 %
ADMINISTRATION = ("contrib/admin", "contrib/admindocs", "contrib/auth")
TASK = ("conf", *ADMINISTRATION)


@dataclasses.dataclass(frozen=True)
class Messages:
    """Messages of one language.

    Attributes:
      tokens: `[messages, length]` int32, of the vocabulary of all languages here.
      mask: true where a token is one.
      labels: 1 where the administration shows the message, 0 where the core does, -1 for other applications.
      train: whether the English original is one to train on.
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    train: np.ndarray


@dataclasses.dataclass(frozen=True)
class Languages:
    """The encoder's first layers with the word pieces that occur, and the messages of every language.

    Attributes:
      module: the encoder.
      params: its pretrained parameters.
      masked: the id of the mask token.
      pad: the id of padding.
      messages: by language.
    """

    module: Bert
    params: Any
    masked: int
    pad: int
    messages: dict[str, Messages]


@functools.cache
def load_languages(codes: Sequence[str], layers: int, seed: int) -> Languages:
    """Returns MiniLM's first layers over the word pieces of some languages, and their messages.

    English originals are split in halves by the seed, and all translations of one are in the same half.

    Args:
      codes: locales; "en" for the originals.
      layers: layers that are kept.
      seed: of the split.
    """
    model = load_minilm(num_layers=layers)
    tokenizer = model.load_tokenizer()
    records = {code: list(messages_by_application(code)) for code in codes}
    coded = {code: encode_texts(tokenizer, [r.text for r in found], LENGTH) for code, found in records.items()}
    special = [tokenizer.token_to_id(name) for name in ("[PAD]", "[MASK]")]
    used = np.unique(np.concatenate([special, *(np.ravel(tokens) for tokens, _ in coded.values())]))
    params = dict(model.params)
    tables = dict(params["embeddings"])
    tables["word"] = {"embedding": tables["word"]["embedding"][used]}
    tables["position"] = {"embedding": tables["position"]["embedding"][:LENGTH]}
    config = dataclasses.replace(model.config, vocab_size=len(used), max_positions=LENGTH)
    originals = sorted({r.group for found in records.values() for r in found})
    chosen = np.random.default_rng(seed).permutation(len(originals)) < len(originals) // 2
    in_train = dict(zip(originals, chosen, strict=True))
    messages = {}
    for code, found in records.items():
        tokens, mask = coded[code]
        labels = [int(r.label in ADMINISTRATION) if r.label in TASK else -1 for r in found]
        train = np.asarray([in_train[r.group] for r in found])
        messages[code] = Messages(
            np.searchsorted(used, tokens).astype(np.int32), np.asarray(mask), np.asarray(labels), train
        )
    pad, masked = (int(np.searchsorted(used, i)) for i in special)
    return Languages(Bert(config), {**params, "embeddings": tables}, masked, pad, messages)


def hidden(module: Bert, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Hidden states `[batch, length, width]`."""
    return module.apply({"params": params["encoder"]}, tokens, mask)  # pyright: ignore[reportReturnType]


def task_logits(module: Bert, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits of the two kinds of messages."""
    pooled = mean_pool(hidden(module, params, tokens, mask), mask)
    return pooled @ params["out"]["kernel"] + params["out"]["bias"]


def masked_loss(
    module: Bert, params: Any, tokens: jax.Array, mask: jax.Array, masked: int, key: jax.Array
) -> jax.Array:
    """Cross-entropy of a few hidden tokens of each message; the decoder's table is the pretrained one, and frozen."""
    scores = jnp.where(mask, jax.random.uniform(key, tokens.shape), -1.0)
    found, places = jax.lax.top_k(scores, HIDDEN)
    rows = jnp.arange(len(tokens))[:, None]
    states = hidden(module, params, tokens.at[rows, places].set(masked), mask)[rows, places]
    logits = (states @ params["decoder"]["kernel"] + params["decoder"]["bias"]) @ params["table"].T
    answers = jnp.take_along_axis(logits, tokens[rows, places][..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - answers
    return jnp.sum(jnp.where(found >= 0.0, losses, 0.0)) / jnp.sum(found >= 0.0)
