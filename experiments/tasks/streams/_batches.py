"""Batches of a stream: of one task, mixed from all for joint training, and held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.tasks.streams._data import StreamData

HELD_OUT_SIZE = 50


def own(data: StreamData, task: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields batches of one task, epoch after epoch, each in an order of its own."""
    part = data.splits[task]["train"]
    count = len(part["labels"])
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch, task]).permutation(count)
        for start in range(0, count - size + 1, size):
            yield _batch(part, task, order[start : start + size])
        epoch += 1


def mixed(
    data: StreamData, order: Sequence[int], size: int, seed: int, place: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Yields batches with examples of all tasks, mixed from the batches that `own` gives one task after the other.

    Args:
      data: the tasks.
      order: of the tasks.
      size: of a batch.
      seed: as of `own`.
      place: which part of the stream this is; it goes on where the part before ended.
      steps: batches of a part.
    """
    sources = [own(data, task, size, seed) for task in order]
    rng = np.random.default_rng([seed, place])
    for source in sources:
        for _ in range(place * steps // len(sources)):
            next(source)
    while True:
        pool = [next(source) for source in sources]
        everything = {k: np.concatenate([b[k] for b in pool]) for k in pool[0]}
        shuffled = rng.permutation(len(everything["labels"])).reshape(len(sources), -1)
        for chosen in shuffled:
            yield {k: v[chosen] for k, v in everything.items()}


def held_out(data: StreamData, task: int, split: str) -> Iterator[dict[str, Any]]:
    """Yields a split of a task once, in order; the last batch may be shorter."""
    part = data.splits[task][split]
    for start in range(0, len(part["labels"]), HELD_OUT_SIZE):
        yield _batch(part, task, np.arange(start, min(start + HELD_OUT_SIZE, len(part["labels"]))))


def _batch(part: Any, task: int, chosen: np.ndarray) -> dict[str, Any]:
    batch = {name: values[chosen] for name, values in part.items()}
    return {**batch, "task": np.full(len(chosen), task, np.int32)}
