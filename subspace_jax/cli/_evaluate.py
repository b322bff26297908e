"""Judges a model on examples: loss over all labels, accuracy, macro F1, and every prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ._examples import Examples
from ._problem import Judged


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model reaches.

    Attributes:
      metrics: `loss` over all labels; `accuracy` of classes or tokens; `macro_f1` of classes, `perplexity` of tokens.
      predictions: one dict for every row of the user's file.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


def evaluate_model(
    judge: Callable[[Any, Any], Judged], adapted: Any, examples: Examples, batch: int, classes: tuple[Any, ...] = ()
) -> Evaluation:
    """Returns the metrics of a model, weighed by labels: the size of the batches plays no part.

    Args:
      judge: compiled `Problem.judge` of the model's logits.
      adapted: parameters.
      examples: to judge by.
      batch: rows at a time.
      classes: of a classification; empty for a language model.
    """
    judged: list[tuple[np.ndarray, ...]] = []
    for index, rows in examples.once(batch):
        judged.append(tuple(np.asarray(part)[: len(index)] for part in judge(adapted, rows)))
    losses, counts, guesses, probabilities = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    if classes:
        return _classes(losses, guesses, probabilities, examples, classes)
    return _tokens(losses, counts, guesses, examples)


def _classes(
    losses: np.ndarray, guesses: np.ndarray, probabilities: np.ndarray, examples: Examples, classes: tuple[Any, ...]
) -> Evaluation:
    labels = examples.arrays["labels"]
    metrics = {
        "loss": float(losses.astype(np.float64).mean()),
        "accuracy": float((guesses == labels).mean()),
        "macro_f1": macro_f1(labels, guesses, len(classes)),
    }
    predictions = [
        {
            "row": detail["row"],
            "label": classes[label],
            "prediction": classes[guess],
            "probability": round(float(probability), 6),
            "loss": round(float(loss), 6),
        }
        for detail, label, guess, probability, loss in zip(
            examples.details, labels, guesses, probabilities, losses, strict=True
        )
    ]
    return Evaluation(metrics, predictions)


def macro_f1(labels: np.ndarray, guesses: np.ndarray, classes: int) -> float:
    """Returns the mean over classes of F1; a class that is neither seen nor guessed is left out.

    Args:
      labels: integers.
      guesses: the same.
      classes: how many there are.

    Example:
      >>> import numpy as np
      >>> round(macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), 3), 4)
      0.6667
    """
    hits, seen, guessed = (
        np.bincount(values, minlength=classes).astype(np.float64)
        for values in (labels[labels == guesses], labels, guesses)
    )
    present = seen + guessed > 0
    return float((2 * hits[present] / (seen + guessed)[present]).mean())


def _tokens(losses: np.ndarray, counts: np.ndarray, guesses: np.ndarray, examples: Examples) -> Evaluation:
    learned = counts > 0
    total = float(losses[learned].astype(np.float64).sum())
    count = int(learned.sum())
    right = guesses == examples.arrays["tokens"][:, 1:]
    metrics = {
        "loss": total / count,
        "accuracy": float(right[learned].mean()),
        "perplexity": float(np.exp(total / count)),
    }
    segments, predictions = examples.arrays["segments"][:, 1:], []
    for row, numbers in enumerate(examples.rows):
        for segment, number in enumerate(numbers, 1):
            inside = learned[row] & (segments[row] == segment)
            loss = losses[row][inside].astype(np.float64)
            predictions.append(
                {
                    "row": number,
                    "labels": int(inside.sum()),
                    "loss": round(float(loss.mean()), 6),
                    "accuracy": round(float(right[row][inside].mean()), 6),
                }
            )
    return Evaluation(metrics, predictions)
