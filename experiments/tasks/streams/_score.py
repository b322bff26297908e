"""How a stream is scored: among the classes of an example's task, and among those of all tasks so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import subspace_jax as sj
from experiments.tasks.streams._batches import held_out
from experiments.tasks.streams._data import StreamData
from experiments.tasks.training import evaluate

SCENARIOS = ("task", "class")
SCORES = ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy")


def accuracies(logits: np.ndarray, labels: np.ndarray, task: int, seen: Sequence[int]) -> dict[str, float]:
    """Returns the accuracies on one task.

    Args:
      logits: `[examples, tasks, classes]`.
      labels: of the examples, counted within the task.
      task: the examples' own.
      seen: the tasks so far, the own one among them.

    Returns:
      "task": the share of examples whose class is best among those of the own task; "class": among those of all
      tasks so far.
    """
    among = logits[:, list(seen)].reshape(len(labels), -1)
    wanted = list(seen).index(task) * logits.shape[-1] + labels
    return {
        "task": float((logits[:, task].argmax(-1) == labels).mean()),
        "class": float((among.argmax(-1) == wanted).mean()),
    }


class Scorer:
    """Evaluates a stream both ways, on tasks in the order in which they come.

    Args:
      data: tasks and model.
      logits: `data.logits`, compiled.
      order: of the tasks.
      split: on which to evaluate.

    Attributes:
      place: of the latest task that training has come to; the stream sets it.
    """

    def __init__(self, data: StreamData, logits: Callable[[Any, Any], jax.Array], order: Sequence[int], split: str):
        self._data, self._logits, self._order = data, logits, order
        self._batches = [list(held_out(data, task, split)) for task in order]
        self.place = 0
        self._matrices = {name: np.full((len(order), len(order)), np.nan) for name in SCENARIOS}

    def score(self, place: int, params: Any) -> float:
        """Returns the class-incremental accuracy on the task of a place, by which rates are chosen, and keeps both."""
        batches, task = self._batches[place], self._order[place]
        flat = evaluate(self._logits, sj.merge(params), batches)[1]
        labels = np.concatenate([b["labels"] for b in batches])
        found = accuracies(flat.reshape(len(labels), len(self._data.names), -1), labels, task, self._seen())
        for name, value in found.items():
            self._matrices[name][self.place, place] = value
        return found["class"]

    def record(self) -> dict[str, Any]:
        """Returns both matrices, with the scores of a stream where they are complete."""
        return {name: _with_scores(self._matrices[name]) for name in SCENARIOS}

    def _seen(self) -> Sequence[int]:
        return self._order[: self.place + 1]


def _with_scores(matrix: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"matrix": [[None if np.isnan(v) else v for v in row] for row in matrix.tolist()]}
    if not np.isnan(np.diagonal(matrix)).any():  # the last row alone was wanted
        scores = sj.continual.stream_scores(matrix)._asdict()
        found |= {name: scores[name] for name in SCORES}
    return found
