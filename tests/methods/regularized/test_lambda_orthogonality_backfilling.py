"""Orders and curves of backfilling against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax.methods.regularized.lambda_orthogonality as backfilling
from subspace_jax import metrics
from tests.tolerances import tolerance


def gallery(items=30, width=5, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(items, width)).astype(np.float32), rng.integers(0, classes, items)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_order_is_descending_by_the_distance_from_the_class_mean(distance):
    features, labels = gallery()
    far = []
    for row, label in zip(features.astype(np.float64), labels, strict=True):
        mean = features[labels == label].astype(np.float64).mean(0)
        cosine = row @ mean / np.linalg.norm(row) / np.linalg.norm(mean)
        far.append(np.linalg.norm(row - mean) if distance == "euclidean" else 1 - cosine)
    found = jax.jit(backfilling.backfill_order, static_argnames=("num_classes", "distance"))(
        features, labels, num_classes=6, distance=distance
    )
    np.testing.assert_array_equal(found, np.argsort(-np.array(far), kind="stable"))
    assert sorted(found.tolist()) == list(range(30))
    assert found.dtype == jnp.int32


def test_items_at_their_class_mean_come_last_and_ties_keep_their_order():
    features = jnp.array([[0.0], [5.0], [1.0], [-1.0], [5.0]])
    labels = jnp.array([0, 1, 0, 0, 1])
    assert backfilling.backfill_order(features, labels, 2).tolist() == [2, 3, 0, 1, 4]


@pytest.mark.parametrize("score", ["cmc", "map"])
def test_curve_replaces_the_first_of_the_order(score):
    queries, query_labels = gallery(12, seed=3)
    (old, labels), new = gallery(23), gallery(23, seed=1)[0]
    order = np.random.default_rng(2).permutation(23)
    found = backfilling.backfilling_curve(
        queries, query_labels, old, new, labels, jnp.asarray(order), points=5, score=score
    )
    expected = []
    for beta in (0.0, 0.25, 0.5, 0.75, 1.0):
        mixed = old.copy()
        mixed[order[: int(np.floor(beta * 23))]] = new[order[: int(np.floor(beta * 23))]]
        scores = metrics.retrieval_scores(queries, query_labels, mixed, labels, ks=(1,))
        expected.append(scores.cmc[0] if score == "cmc" else scores.mean_average_precision)
    np.testing.assert_allclose(found, expected, rtol=tolerance())


def test_a_query_does_not_find_itself():
    features, labels = gallery()
    order = jnp.arange(30)
    found = backfilling.backfilling_curve(features, labels, features, features, labels, order, points=3, same_set=True)
    expected = metrics.retrieval_scores(features, labels, features, labels, ks=(1,), same_set=True).cmc[0]
    np.testing.assert_allclose(found, [expected] * 3)
    assert expected < 1.0


def test_bad_input_is_refused():
    features, labels = gallery()
    with pytest.raises(ValueError, match=r"labels \(29,\)"):
        backfilling.backfill_order(features, labels[1:], 4)
    with pytest.raises(ValueError, match="distance='manhattan'"):
        backfilling.backfill_order(features, labels, 4, distance="manhattan")
    with pytest.raises(ValueError, match=r"new \(30, 4\)"):
        backfilling.backfilling_curve(features, labels, features, features[:, :4], labels, jnp.arange(30))
    with pytest.raises(ValueError, match="points=1"):
        backfilling.backfilling_curve(features, labels, features, features, labels, jnp.arange(30), points=1)
