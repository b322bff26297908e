"""Retrieval scores of embeddings: a query finds what has its label in a gallery."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RetrievalScores(NamedTuple):
    """Scores over the queries that have a match in the gallery.

    Attributes:
      cmc: share of queries with a match among the best k, by k, `[len(ks)]`.
      mean_average_precision: mean over queries of the area under their precision-recall steps.
      valid: number of queries with a match in the gallery.
    """

    cmc: jax.Array
    mean_average_precision: jax.Array
    valid: jax.Array


def retrieval_scores(
    queries: jax.Array,
    query_labels: jax.Array,
    gallery: jax.Array,
    gallery_labels: jax.Array,
    *,
    ks: Sequence[int] = (1, 5),
    top: int | None = None,
    same_set: bool = False,
    block: int = 256,
) -> RetrievalScores:
    r"""Ranks a gallery by cosine similarity for each query, and scores the ranking.

    Average precision of a query with \(m\) matches is \(\frac{1}{m} \sum_r rel_r \frac{1}{r} \sum_{j \le r} rel_j\),
    over the whole list. Equal similarities keep the gallery's order. Queries without a match are left out.

    Args:
      queries: `[queries, features]`.
      query_labels: `[queries]` integers.
      gallery: `[items, features]`.
      gallery_labels: `[items]` integers.
      ks: list lengths of the cumulative match characteristic.
      top: cut lists here; average precision then divides by the smaller of `top` and the number of matches.
      same_set: item i of both is the same, and no query may find itself.
      block: queries ranked at a time; memory is `block` times the gallery.

    Returns:
      `RetrievalScores`; where no query has a match, `valid` is 0 and the scores are NaN.

    Raises:
      ValueError: with `same_set` there are not as many queries as items.
      ValueError: an entry of `ks` is below 1 or above the number of items.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]]), jnp.array([0, 0, 1, 1])
      >>> scores = retrieval_scores(x, y, x, y, ks=(1,), same_set=True)
      >>> float(scores.cmc[0]), round(float(scores.mean_average_precision), 4)
      (0.75, 0.8333)
    """
    if same_set and len(queries) != len(gallery):
        raise ValueError(f"retrieval_scores: same_set with {len(queries)} queries and {len(gallery)} items.")
    if max(ks) > len(gallery) or min(ks) < 1:
        raise ValueError(f"retrieval_scores: ks={tuple(ks)}; expected 1 to the gallery's {len(gallery)}.")
    return _scores(queries, query_labels, gallery, gallery_labels, tuple(ks), top, same_set, block)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _scores(
    queries: jax.Array,
    query_labels: jax.Array,
    gallery: jax.Array,
    gallery_labels: jax.Array,
    ks: tuple[int, ...],
    top: int | None,
    same_set: bool,
    block: int,
) -> RetrievalScores:
    directions = _normalized(gallery)
    items = len(gallery)

    def one(query: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        features, label, index = query
        similarity = jnp.matmul(directions, features, precision=jax.lax.Precision.HIGHEST)
        # Itself goes last, by its index: an equal item elsewhere is a fair match.
        itself = (jnp.arange(items) == index) & same_set
        order = jnp.argsort(jnp.where(itself, jnp.inf, -similarity), stable=True)
        relevant = ((gallery_labels == label) & ~itself)[order]
        matches = jnp.sum(relevant)
        ranks = jnp.arange(1, items + 1)
        counted = relevant if top is None else relevant & (ranks <= top)
        possible = matches if top is None else jnp.minimum(matches, top)
        precision = jnp.sum(counted * jnp.cumsum(counted) / ranks) / jnp.maximum(possible, 1)
        found = jnp.stack([jnp.any(relevant[:k]) for k in ks])
        return found, precision, matches > 0

    inputs = (_normalized(queries), query_labels, jnp.arange(len(queries)))
    found, precision, valid = jax.lax.map(one, inputs, batch_size=min(block, max(1, len(queries))))
    count = jnp.sum(valid)
    scale = jnp.maximum(count, 1)
    nothing = jnp.where(count > 0, 0.0, jnp.nan)
    return RetrievalScores(
        jnp.sum(found * valid[:, None], axis=0) / scale + nothing, jnp.sum(precision * valid) / scale + nothing, count
    )


def _normalized(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def class_means(features: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns the normalized mean embedding of every class, `[classes, features]`, as a gallery of one item each.

    Args:
      features: `[items, features]`, normalized first.
      labels: `[items]` integers below `num_classes`.
      num_classes: a Python int.
    """
    return _normalized(jax.ops.segment_sum(_normalized(features), labels, num_classes))
