"""Judges a model on examples: loss over all labels, accuracy, macro F1, and every prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ._examples import Examples
from ._problem import CHUNK, Problem


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model reaches.

    Attributes:
      metrics: `loss` over all labels; `accuracy` of classes or tokens; `macro_f1` of classes, `perplexity` of tokens.
      predictions: one dict for every row of the user's file.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


def evaluate_model(problem: Problem, adapted: Any, examples: Examples, batch: int) -> Evaluation:
    """Returns the metrics of a model, weighed by labels: the size of the batches plays no part.

    Args:
      problem: model and labels.
      adapted: parameters.
      examples: to judge by.
      batch: most rows at a time; fewer where they have so many tokens that their logits would fill the memory.
    """
    if not problem.classifies:
        batch = max(1, min(batch, CHUNK // examples.arrays["tokens"].shape[1]))
    judged: list[tuple[np.ndarray, ...]] = []
    for index, rows in examples.once(batch):
        judged.append(tuple(np.asarray(part)[: len(index)] for part in problem.judge(adapted, rows)))
    losses, counts, guesses, probabilities = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    if problem.classifies:
        return _classes(losses, guesses, probabilities, examples, problem.classes)
    return _tokens(losses, counts, guesses, examples)


def _classes(
    losses: np.ndarray, guesses: np.ndarray, probabilities: np.ndarray, examples: Examples, classes: tuple[Any, ...]
) -> Evaluation:
    from sklearn.metrics import f1_score

    labels = examples.arrays["labels"]
    metrics = {
        "loss": float(losses.astype(np.float64).mean()),
        "accuracy": float((guesses == labels).mean()),
        "macro_f1": float(f1_score(labels, guesses, average="macro")),
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
