"""Backfilling: the order in which a gallery's features are renewed, and retrieval scores on the way."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from subspace_jax.metrics import retrieval_scores

Distance = Literal["euclidean", "cosine"]


def backfill_order(
    features: jax.Array, labels: jax.Array, num_classes: int, *, distance: Distance = "euclidean"
) -> jax.Array:
    r"""Returns the order in which to renew a gallery: least representative items first.

    Descending by \(\|f_i - \mu_{y_i}\|\), or \(1 - \cos(f_i, \mu_{y_i})\), with \(\mu\) the means of the classes. Items
    at equal distances keep the gallery's order; those at their class's mean come last.

    Args:
      features: of the gallery, forward-adapted, `[items, features]`.
      labels: `[items]` integers below `num_classes`.
      num_classes: a Python int.
      distance: "euclidean" or "cosine".

    Returns:
      A permutation of the items, `[items]` int32.

    Raises:
      ValueError: the shapes do not fit, or `distance` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> backfill_order(jnp.array([[0.0], [1.0], [8.0]]), jnp.array([0, 0, 0]), 1).tolist()
      [2, 0, 1]
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"backfill_order: features {features.shape} with labels {labels.shape}; expected [items, features] and "
            "[items]."
        )
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f'backfill_order: distance={distance!r}; expected "euclidean" or "cosine".')
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    members = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
    sizes = jnp.maximum(jnp.sum(members, axis=0), 1)
    precision = jax.lax.Precision.HIGHEST
    means = jnp.matmul(members.T, features, precision=precision) / sizes[:, None]
    own = jnp.matmul(members, means, precision=precision)
    if distance == "euclidean":
        far = jnp.linalg.norm(features - own, axis=-1)
    else:
        lengths = jnp.linalg.norm(features, axis=-1) * jnp.linalg.norm(own, axis=-1)
        far = 1 - jnp.sum(features * own, axis=-1) / jnp.maximum(lengths, 1e-12)
    return jnp.argsort(-far, stable=True).astype(jnp.int32)


def backfilling_curve(
    queries: jax.Array,
    query_labels: jax.Array,
    old: jax.Array,
    new: jax.Array,
    gallery_labels: jax.Array,
    order: jax.Array,
    *,
    points: int = 11,
    score: Literal["cmc", "map"] = "cmc",
    same_set: bool = False,
) -> jax.Array:
    r"""Returns scores while a gallery is renewed, at equal steps of the share \(\beta\); see `backfilling_score`.

    At share \(\beta\) the first \(\lfloor \beta N \rfloor\) items of the order have new features.

    Args:
      queries: `[queries, features]`.
      query_labels: `[queries]` integers.
      old: adapted old features of the gallery, `[items, features]`.
      new: its new features, of the same shape.
      gallery_labels: `[items]` integers.
      order: a permutation of the items, such as `backfill_order` gives.
      points: number of shares, 0 and 1 among them.
      score: "cmc", whether the best match is right, or "map", mean average precision.
      same_set: query i and item i are the same, and no query may find itself.

    Returns:
      `[points]` in float32.

    Raises:
      ValueError: the shapes do not fit, `points` is below two or `score` unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> old, new, y = jnp.eye(2)[::-1], jnp.eye(2), jnp.array([0, 1])
      >>> backfilling_curve(new, y, old, new, y, jnp.array([1, 0]), points=3).tolist()
      [0.0, 0.5, 1.0]
    """
    if old.shape != new.shape or order.shape != old.shape[:1]:
        raise ValueError(
            f"backfilling_curve: old {old.shape}, new {new.shape} and order {order.shape}; expected twice "
            "[items, features] and [items]. Old features have to be forward-adapted to the new width."
        )
    if points < 2 or score not in ("cmc", "map"):
        raise ValueError(
            f'backfilling_curve: points={points}, score={score!r}; expected at least 2 and "cmc" or "map".'
        )
    items = len(order)
    place = jnp.argsort(order)  # of each item in the order
    curve = []
    for step in range(points):
        renewed = place < step * items // (points - 1)
        gallery = jnp.where(renewed[:, None], new, old)
        found = retrieval_scores(queries, query_labels, gallery, gallery_labels, ks=(1,), same_set=same_set)
        curve.append(found.cmc[0] if score == "cmc" else found.mean_average_precision)
    return jnp.stack(curve)
