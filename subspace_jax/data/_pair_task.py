"""Image-text tasks: pictures with a caption, a category and a finer topic."""

import dataclasses
import os
from typing import Any

import numpy as np

from subspace_jax.data._prepare import open_dataset
from subspace_jax.data._sources import PAIR_SOURCES
from subspace_jax.data._task import Task, read_rows

_WHITE = np.float32(1 / 255)


@dataclasses.dataclass(frozen=True, eq=False)
class PairSplit:
    """One split of an image-text task.

    Attributes:
        images: uint8 [n, height, width, 3].
        texts: the captions, `n` of them.
        categories: int32 [n], of `PairTask.category_names`.
        topics: int32 [n], of `PairTask.topic_names`.
    """

    images: np.ndarray
    texts: tuple[str, ...]
    categories: np.ndarray
    topics: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True, eq=False)
class PairTask(Task[PairSplit]):
    """Images with captions in memory.

    Attributes:
        name: name of the dataset.
        splits: the splits by name.
        category_names: names of the categories.
        topic_names: names of the topics, which are finer.
    """

    category_names: tuple[str, ...] = ()
    topic_names: tuple[str, ...] = ()

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Returns a split's `images` as stored, `categories`, `topics`, and the captions as an object array `texts`."""
        chosen = self[split]
        texts = np.asarray(chosen.texts, dtype=object)
        return {"images": chosen.images, "texts": texts, "categories": chosen.categories, "topics": chosen.topics}

    def batches(self, split: str, batch_size: int, **options: Any):
        """Iterates over an epoch of a split, with `images` as float32 in [0, 1].

        Args:
            split: name of the split.
            batch_size: examples in a batch.
            **options: `seed`, `epoch`, `start`, `shuffle` and `drop_remainder`, as in `Task.batches`.

        Returns:
            An iterator over dictionaries.

        Raises:
            ValueError: there is no such split, batch_size or start is out of range, or no batch would be
            full.
        """
        batches = super().batches(split, batch_size, **options)
        return ({**batch, "images": batch["images"].astype(np.float32) * _WHITE} for batch in batches)


def load_pair_task(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> PairTask:
    """Loads a packaged image-text dataset into memory, preparing it in the cache when it is first asked for.

    The drawings of `emoji_google` and `emoji_twitter` are of the same 1,911 things in two styles, in the same splits.

    Args:
        name: one of `pair_tasks()`.
        data_dir: tfds folder; `tfds` in the cache folder if None.

    Returns:
        The task, with the splits `train`, `validation` and `test`, sorted by caption.

    Raises:
        AssetMissingError: the package that carries the dataset is not here.
        ImportError: the `tfds` extra, or Pillow, is not installed.
        ValueError: the dataset is unknown.
    """
    if name not in PAIR_SOURCES:
        raise ValueError(f"no image-text task is called {name!r}; there are {', '.join(PAIR_SOURCES)}")
    info, sources = open_dataset(name, data_dir)
    splits = {}
    for split, source in sources.items():
        rows = sorted(read_rows(name, split, source, None, seed=0), key=lambda row: (_text(row), row["group"]))
        splits[split] = PairSplit(
            np.stack([np.asarray(row["image"]) for row in rows]),
            tuple(_text(row) for row in rows),
            np.asarray([row["category"] for row in rows], np.int32),
            np.asarray([row["topic"] for row in rows], np.int32),
        )
    names = (tuple(info.features[feature].names) for feature in ("category", "topic"))
    return PairTask(name, splits, *names)


def _text(row: dict[str, Any]) -> str:
    return row["text"].decode("utf8") if isinstance(row["text"], bytes) else str(row["text"])
