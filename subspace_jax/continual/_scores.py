"""Scores of a finished stream: accuracy, transfer and forgetting."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from subspace_jax.continual._learner import StreamError
from subspace_jax.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_accuracy,
    learning_accuracy,
)


class StreamScores(NamedTuple):
    """Scores of a stream, in the unit of its accuracy matrix.

    Attributes:
      average_accuracy: mean over tasks at the end.
      incremental_accuracy: mean over time of the mean over the tasks seen.
      backward_transfer: mean change from when a task was learned to the end; negative is forgetting.
      forgetting: mean loss from a task's best earlier score.
      learning_accuracy: mean score of each task when it was learned.
      forward_transfer: mean gain on tasks to come over the untrained model; None where they were not evaluated.
    """

    average_accuracy: float
    incremental_accuracy: float
    backward_transfer: float
    forgetting: float
    learning_accuracy: float
    forward_transfer: float | None


def stream_scores(matrix: Any, base: Any = None) -> StreamScores:
    """Returns the scores of `subspace_jax.metrics` for a finished stream of two tasks or more.

    Args:
      matrix: the accuracy matrix, as `run_stream` gives it.
      base: scores before any training, for forward transfer.

    Raises:
      StreamError: an entry on or below the diagonal is missing: the stream has not ended, or was not evaluated.
      ValueError: the matrix is not square, or has one task only.

    Example:
      >>> scores = stream_scores([[0.9, 0.2, 0.3], [0.8, 0.85, 0.25], [0.7, 0.8, 0.95]], [0.1, 0.1, 0.1])
      >>> [round(value, 3) for value in scores]
      [0.817, 0.847, -0.125, 0.125, 0.9, 0.125]
    """
    matrix = np.asarray(matrix, np.float64)
    backward = float(backward_transfer(matrix))  # refuses other shapes
    missing = np.argwhere(np.tril(np.isnan(matrix)))
    if missing.size:
        row, column = missing[0].tolist()
        raise StreamError(
            f"stream_scores: there is no score on task {column} after training on task {row}. Finish the stream first, "
            'and evaluate at least the tasks "seen".'
        )
    forward = None if base is None else float(forward_transfer(matrix, base))
    return StreamScores(
        average_accuracy=float(average_accuracy(matrix)),
        incremental_accuracy=float(incremental_accuracy(matrix)),
        backward_transfer=backward,
        forgetting=float(forgetting(matrix)),
        learning_accuracy=float(learning_accuracy(matrix)),
        forward_transfer=None if forward is None or np.isnan(forward) else forward,
    )
