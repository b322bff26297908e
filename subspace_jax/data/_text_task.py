"""Text tasks: packaged ones, and any tfds dataset that is prepared."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace_jax.data._labels import read_labels
from subspace_jax.data._prepare import open_dataset
from subspace_jax.data._task import Task, read_rows, require_features

if TYPE_CHECKING:
    import tokenizers

Text = str | tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class TextSplit:
    """One split of a text task.

    Attributes:
        texts: the texts, or pairs of them.
        labels: int32 [n] class indices, or float32 [n] ratings.
        tokens: int32 [n, length] token ids, padded; None without a tokenizer.
        mask: int32 [n, length], 1 at tokens and 0 at padding; None without a tokenizer.
        token_types: int32 [n, length], 1 in the second text of a pair; None without a tokenizer.
    """

    texts: tuple[Text, ...]
    labels: np.ndarray
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None
    token_types: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask(Task[TextSplit]):
    """A text dataset in memory, tokenized if a tokenizer was given.

    Attributes:
        name: name of the dataset.
        splits: the splits by name.
        label_names: names of the classes; empty where the labels are ratings.
    """

    label_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 where the labels are ratings."""
        return len(self.label_names) or 1

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Returns `tokens`, `mask`, `token_types` and `labels`; only `labels` without a tokenizer."""
        chosen = self[split]
        named = {
            "tokens": chosen.tokens,
            "mask": chosen.mask,
            "token_types": chosen.token_types,
            "labels": chosen.labels,
        }
        return {name: array for name, array in named.items() if array is not None}


def tokenize(
    texts: Sequence[Text], tokenizer: "tokenizers.Tokenizer", max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns texts into arrays of one length, truncated and padded on the right.

    Args:
        texts: texts or pairs of texts.
        tokenizer: a tokenizer of the `tokenizers` package; it is copied, not changed. Its own padding token
        is
            used, otherwise `[PAD]` or `<pad>`, otherwise token 0.
        max_length: tokens in a row, special tokens included.

    Returns:
        Tokens, mask and token types, each int32 [n, max_length].

    Raises:
        ValueError: max_length leaves no room for a token beside the special ones.
    """
    special = tokenizer.num_special_tokens_to_add(is_pair=any(isinstance(text, tuple) for text in texts))
    if max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: the tokenizer adds {special} special tokens"
        )
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.enable_truncation(max_length)
    own.enable_padding(length=max_length, **_padding(tokenizer))
    encodings = own.encode_batch(list(texts))
    return (
        np.asarray([e.ids for e in encodings], np.int32).reshape(-1, max_length),
        np.asarray([e.attention_mask for e in encodings], np.int32).reshape(-1, max_length),
        np.asarray([e.type_ids for e in encodings], np.int32).reshape(-1, max_length),
    )


def _padding(tokenizer: "tokenizers.Tokenizer") -> dict[str, Any]:
    if tokenizer.padding:
        return {key: tokenizer.padding[key] for key in ("pad_id", "pad_token", "pad_type_id")}
    for token in ("[PAD]", "<pad>"):
        index = tokenizer.token_to_id(token)
        if index is not None:
            return {"pad_id": index, "pad_token": token}
    return {"pad_id": 0, "pad_token": tokenizer.id_to_token(0) or ""}


def load_text_task(
    name: str,
    *,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    max_length: int = 48,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    text_feature: str | tuple[str, str] = "text",
    label_feature: str = "label",
) -> TextTask:
    """Loads a text dataset into memory: a packaged one, or any that tfds finds prepared.

    A packaged dataset is prepared in the cache when it is first asked for.

    Args:
        name: one of `text_tasks()`, or a tfds name such as `glue/sst2`.
        tokenizer: a tokenizer of the `tokenizers` package; without one only texts and labels are loaded.
        max_length: tokens in a row, special tokens included.
        train_size: number of training examples to draw; all if None.
        eval_size: number of examples to draw of every other split; all if None or if the split has no more.
        seed: non-negative seed of the draws.
        data_dir: tfds folder; for packaged datasets `tfds` in the cache folder if None.
        text_feature: feature that holds the text, or two features for pairs of texts.
        label_feature: feature that holds the label.

    Returns:
        The task, with the splits of the dataset (`train`, `validation`, `test` for packaged ones).

    Raises:
        AssetMissingError: the package that carries the dataset is not here.
        ImportError: the `tfds` extra is not installed.
        ValueError: the dataset is unknown or not prepared, has no such features, or is smaller than asked.
    """
    info, sources = open_dataset(name, data_dir)
    features = (text_feature,) if isinstance(text_feature, str) else tuple(text_feature)
    require_features(name, info, (*features, label_feature), parameters="text_feature and label_feature")
    texts: dict[str, tuple[Text, ...]] = {}
    values: dict[str, list[Any]] = {}
    for split, source in sources.items():
        size = train_size if split == "train" else eval_size
        examples = list(read_rows(name, split, source, size, seed=seed))
        texts[split] = tuple(_text(name, example, features) for example in examples)
        values[split] = [example[label_feature] for example in examples]
    labels, label_names = read_labels(name, info, label_feature, values)
    splits = _splits(texts, labels, tokenizer, max_length)
    return TextTask(name=name, splits=splits, label_names=label_names)


def _text(name: str, example: Mapping[str, Any], features: tuple[str, ...]) -> Text:
    parts = []
    for feature in features:
        value = example[feature]
        if not isinstance(value, bytes | str):
            raise ValueError(
                f"dataset {name!r}: feature {feature!r} holds {type(value).__name__}, not text; choose "
                "another with text_feature"
            )
        parts.append(value.decode("utf8") if isinstance(value, bytes) else value)
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _splits(
    texts: Mapping[str, tuple[Text, ...]],
    labels: Mapping[str, np.ndarray],
    tokenizer: "tokenizers.Tokenizer | None",
    max_length: int,
) -> dict[str, TextSplit]:
    splits = {}
    for split, array in labels.items():
        if tokenizer is None:
            splits[split] = TextSplit(texts[split], array)
        else:
            tokens, mask, token_types = tokenize(texts[split], tokenizer, max_length)
            splits[split] = TextSplit(texts[split], array, tokens, mask, token_types)
    return splits
