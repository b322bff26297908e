"""Scores training examples by how nearly their gradients point where the target's do."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from subspace_jax.core import Params, StructureError, check_int, check_number
from subspace_jax.methods.analysis.gist._subspace import (
    ExampleLoss,
    TargetSubspace,
    all_products,
    count_examples,
    example_gradients,
    share_of,
)


class Scores(NamedTuple):
    """Scores of training examples.

    Attributes:
      scores: cosines with every subtask's target, `[examples, subtasks]`, in [-1, 1].
      coordinates: of the gradients in the subspace, `[examples, rank]`: all that is kept of an example.
      shares: size of the part inside the subspace, by that of the whole gradient, `[examples]`.
    """

    scores: np.ndarray
    coordinates: np.ndarray
    shares: np.ndarray


def score_examples(
    loss: ExampleLoss,
    params: Params,
    subspace: TargetSubspace,
    examples: Any,
    *,
    frozen: Params | None = None,
    batch_size: int = 32,
    energy_gate: bool = False,
) -> Scores:
    r"""Projects the gradient of every training example and returns cosines: \(\hat z_i^T \hat t_s\), \(z_i = g_i P\).

    A batch of gradients is in memory at a time; `rank` numbers of each example are kept. Directions outside of the
    subspace are not seen: an example without any inside scores 0.

    Args:
      loss: that of `fit_subspace`.
      params: those of `fit_subspace`.
      subspace: what it returned.
      examples: a tree with training examples along axis 0.
      frozen: that of `fit_subspace`.
      batch_size: examples of one compiled call; as `examples` are split over devices along axis 0, so is each batch.
      energy_gate: multiply scores by the share of the gradient inside the subspace, which very small subspaces need.

    Returns:
      The scores, on the host.

    Raises:
      StructureError: there are no examples.
      RankError: `batch_size` is no positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from subspace_jax.methods.analysis.gist import fit_subspace
      >>> loss, params = lambda p, e: p["w"] @ e, {"w": jnp.zeros(3)}
      >>> target = fit_subspace(loss, params, jnp.array([[2.0, 0.0, 0.0]]))
      >>> score_examples(loss, params, target, jnp.array([[1.0, 0.0, 5.0], [-1.0, 0.0, 0.0]])).scores.round(4).tolist()
      [[1.0], [-1.0]]
    """
    count, size = count_examples(examples), check_int("score_examples: batch_size", batch_size)
    found = []
    for first in range(0, count, size):
        # The last batch begins earlier, so that it is as long as the others and nothing compiles again.
        start = max(min(first, count - size), 0)
        batch = jax.tree.map(functools.partial(_rows, start, size), examples)
        parts = _project(loss, params, subspace.basis, batch, frozen)
        found.append([np.asarray(part)[first - start :] for part in parts])
    coordinates, inside, whole = (np.concatenate(parts) for parts in zip(*found, strict=True))
    # Below this the part inside is rounding of the projection.
    seen = inside > 1e-6 * whole
    unit = np.where(seen[:, None], coordinates / np.maximum(inside, np.finfo(np.float32).tiny)[:, None], 0.0)
    shares = np.where(whole > 0, inside / np.maximum(whole, np.finfo(np.float32).tiny), 0.0)
    scores = unit @ np.asarray(subspace.targets).T
    return Scores(scores * shares[:, None] if energy_gate else scores, coordinates, shares)


def _rows(start: int, size: int, array: Any) -> Any:
    """Rows in order, split over devices as all are."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.explicit_axes:
        return array[start : start + size]
    return array.at[start + jnp.arange(min(size, len(array)))].get(out_sharding=sharding.spec)


@functools.partial(jax.jit, static_argnames="loss")
def _project(
    loss: ExampleLoss, params: Params, basis: Params, batch: Any, frozen: Params | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    gradients = jax.tree.leaves(example_gradients(loss, params, batch, frozen))
    total, square = jnp.zeros(()), jnp.zeros(())
    for gradient, directions in zip(gradients, jax.tree.leaves(basis), strict=True):
        total = total + all_products(gradient, directions)
        square = square + jnp.sum(gradient * gradient, axis=tuple(range(1, gradient.ndim)))
    return total, jnp.linalg.norm(total, axis=1), jnp.sqrt(square)


def total_scores(scores: Sequence[Scores], weights: Sequence[float] | None = None) -> np.ndarray:
    r"""Returns one score of every example: \(\max_s \sum_c w_c\,\mathrm{score}_{c,s}\) over checkpoints \(c\).

    Args:
      scores: of the checkpoints, each with its own subspace.
      weights: \(w_c\), the mean learning rate of each checkpoint's epoch; normalized to sum 1. Equal if None.

    Returns:
      `[examples]`.

    Raises:
      StructureError: no checkpoint, or not as many weights.

    Example:
      >>> import numpy as np
      >>> one = Scores(np.array([[0.5, 0.1], [0.0, 0.9]]), np.zeros((2, 1)), np.ones(2))
      >>> total_scores([one]).tolist()
      [0.5, 0.9]
    """
    given = [1.0] * len(scores) if weights is None else list(weights)
    if not scores or len(given) != len(scores):
        raise StructureError(f"total_scores: {len(given)} weights for {len(scores)} checkpoints; expected one each.")
    mixed = sum(w / sum(given) * one.scores for w, one in zip(given, scores, strict=True))
    return np.max(mixed, axis=1)


def select_examples(scores: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Returns the indices of the best examples, best first; of equal ones the earlier.

    Args:
      scores: `[examples]`.
      fraction: share of the pool to keep, rounded down.

    Raises:
      ValueError: `fraction` is not in (0, 1].

    Example:
      >>> import numpy as np
      >>> select_examples(np.array([0.1, 0.9, 0.9, 0.3]), 0.5).tolist()
      [1, 2]
    """
    check_number("select_examples: fraction", fraction, above=0.0, most=1.0)
    return np.argsort(-np.asarray(scores), kind="stable")[: share_of(fraction, len(scores))]
