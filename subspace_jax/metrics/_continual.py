r"""Scores of a stream of tasks, from the accuracy matrix alone.

\(R\) is `[tasks, tasks]`: `R[t, i]` is the score on task `i` after training on tasks `0..t`, higher is better, NaN
where it was not measured. A zero is a score of zero. Tasks weigh the same, and the unit (shares or percent) is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def _square(matrix: Any, least: int = 1) -> jax.Array:
    matrix = jnp.asarray(matrix, jnp.promote_types(jnp.asarray(matrix).dtype, jnp.float32))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < least:
        raise ValueError(
            f"The accuracy matrix has shape {matrix.shape}; expected [tasks, tasks] with at least {least} tasks, a row "
            "for each time and a column for each task."
        )
    return matrix


def accuracy_curve(matrix: Any, weights: Any = None) -> jax.Array:
    r"""Returns the accuracy over the tasks seen so far, at every time: \(A_t = \frac{1}{t+1} \sum_{i \le t} R_{t,i}\).

    Args:
      matrix: \(R\), lower triangle needed.
      weights: numbers of test examples by task, for accuracy over all of them pooled; equal weights if None.

    Returns:
      `[tasks]`.

    Raises:
      ValueError: the matrix is not square, or is empty.

    Example:
      >>> [round(float(a), 4) for a in accuracy_curve([[0.9, 0.2, 0.3], [0.8, 0.85, 0.25], [0.7, 0.8, 0.95]])]
      [0.9, 0.825, 0.8167]
    """
    matrix = _square(matrix)
    seen = jnp.tril(jnp.ones_like(matrix)) * (1.0 if weights is None else jnp.asarray(weights, matrix.dtype))
    return jnp.sum(jnp.where(seen > 0, matrix, 0.0) * seen, axis=1) / jnp.sum(seen, axis=1)


def average_accuracy(matrix: Any, weights: Any = None) -> jax.Array:
    r"""Returns the mean score over all tasks at the end, \(A_{T-1}\) (ACC; "Last" of MTIL).

    Args:
      matrix: \(R\), last row needed.
      weights: numbers of test examples by task, for accuracy over all of them pooled; equal weights if None.

    Raises:
      ValueError: the matrix is not square, or is empty.
    """
    return accuracy_curve(matrix, weights)[-1]


def incremental_accuracy(matrix: Any, weights: Any = None) -> jax.Array:
    r"""Returns the mean of \(A_t\) over time, which class-incremental work calls average accuracy.

    Args:
      matrix: \(R\), lower triangle needed.
      weights: numbers of test examples by task, for accuracy over all of them pooled; equal weights if None.

    Raises:
      ValueError: the matrix is not square, or is empty.
    """
    return jnp.mean(accuracy_curve(matrix, weights))


def learning_accuracy(matrix: Any) -> jax.Array:
    r"""Returns the mean of \(R_{i,i}\): how well each task was learned when it was trained.

    Args:
      matrix: \(R\), diagonal needed.

    Raises:
      ValueError: the matrix is not square, or is empty.
    """
    return jnp.mean(jnp.diagonal(_square(matrix)))


def backward_transfer(matrix: Any) -> jax.Array:
    r"""Returns backward transfer, \(\frac{1}{T-1} \sum_{i<T-1} (R_{T-1,i} - R_{i,i})\); negative is forgetting.

    Args:
      matrix: \(R\), diagonal and last row needed.

    Raises:
      ValueError: the matrix is not square, or has one task only.

    Example:
      >>> round(float(backward_transfer([[0.9, 0.2, 0.3], [0.8, 0.85, 0.25], [0.7, 0.8, 0.95]])), 4)
      -0.125
    """
    matrix = _square(matrix, 2)
    return jnp.mean(matrix[-1, :-1] - jnp.diagonal(matrix)[:-1])


def forgetting(matrix: Any, step: int | None = None) -> jax.Array:
    r"""Returns the mean loss from each task's best earlier score, \(\max_{i \le l < t} R_{l,i} - R_{t,i}\).

    The maximum leaves out the row of time \(t\) itself, so a score that only rose gives a negative value.

    Args:
      matrix: \(R\), lower triangle needed.
      step: \(t \ge 1\); the last if None.

    Raises:
      ValueError: the matrix is not square, or there is no earlier task.

    References:
      Chaudhry et al., Riemannian Walk for Incremental Learning, 2018.
    """
    matrix = _square(matrix, 2)
    last = len(matrix) - 1 if step is None else step
    if not 1 <= last < len(matrix):
        raise ValueError(f"forgetting: step={step}; expected 1 to {len(matrix) - 1}.")
    earlier = jnp.tril(jnp.ones_like(matrix))[:last, :last] > 0
    best = jnp.max(jnp.where(earlier, matrix[:last, :last], -jnp.inf), axis=0)
    return jnp.mean(best - matrix[last, :last])


def forward_transfer(matrix: Any, base: Any) -> jax.Array:
    r"""Returns forward transfer, \(\frac{1}{T-1} \sum_{i \ge 1} (R_{i-1,i} - b_i)\).

    Args:
      matrix: \(R\), entries above the diagonal needed; NaN where one is missing.
      base: \(b\), scores of the untrained model, `[tasks]`.

    Raises:
      ValueError: the matrix is not square, or has one task only.

    References:
      Lopez-Paz, Ranzato, Gradient Episodic Memory for Continual Learning, 2017.
    """
    matrix = _square(matrix, 2)
    return jnp.mean(jnp.diagonal(matrix, offset=1) - jnp.asarray(base, matrix.dtype)[1:])


def intransigence(matrix: Any, single: Any) -> jax.Array:
    r"""Returns intransigence: the mean of \(s_i - R_{i,i}\), a task's score alone less that in the stream.

    Args:
      matrix: \(R\), diagonal needed.
      single: \(s\), scores of models trained on one task each, `[tasks]`.

    Raises:
      ValueError: the matrix is not square, or is empty.
    """
    matrix = _square(matrix)
    return jnp.mean(jnp.asarray(single, matrix.dtype) - jnp.diagonal(matrix))


class MultiDomainScores(NamedTuple):
    """Scores of multi-domain task-incremental learning.

    Attributes:
      transfer: mean over tasks 1.. of their mean score before they were trained.
      average: mean of all entries.
      last: mean over tasks at the end.
      transfer_by_task: `[tasks - 1]`.
      average_by_task: `[tasks]`.
      last_by_task: `[tasks]`.
    """

    transfer: jax.Array
    average: jax.Array
    last: jax.Array
    transfer_by_task: jax.Array
    average_by_task: jax.Array
    last_by_task: jax.Array


def multi_domain_scores(matrix: Any) -> MultiDomainScores:
    """Returns Transfer, Average and Last of multi-domain learning; a missing entry of the matrix gives NaN.

    Transfer averages each column above the diagonal first, so that late tasks do not weigh more.

    Args:
      matrix: the full accuracy matrix.

    Raises:
      ValueError: the matrix is not square, or has one task only.

    Example:
      >>> scores = multi_domain_scores([[0.9, 0.2, 0.3], [0.8, 0.85, 0.25], [0.7, 0.8, 0.95]])
      >>> [round(float(v), 4) for v in scores[:3]]
      [0.2375, 0.6389, 0.8167]

    References:
      Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, 2023.
    """
    matrix = _square(matrix, 2)
    above = jnp.triu(jnp.ones_like(matrix), 1)
    sums = jnp.sum(jnp.where(above > 0, matrix, 0.0), axis=0)[1:]
    transfer = sums / jnp.arange(1, len(matrix))
    average = jnp.mean(matrix, axis=0)
    return MultiDomainScores(jnp.mean(transfer), jnp.mean(average), jnp.mean(matrix[-1]), transfer, average, matrix[-1])


def normalized_accuracy(merged: Any, single: Any) -> jax.Array:
    """Returns the mean ratio of a merged model's score to that of the model tuned on the task alone.

    Args:
      merged: `[tasks]`.
      single: `[tasks]`.

    References:
      Ilharco et al., Editing Models with Task Arithmetic, 2023.
    """
    return jnp.mean(jnp.asarray(merged, jnp.float32) / jnp.asarray(single, jnp.float32))
