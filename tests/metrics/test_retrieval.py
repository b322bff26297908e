"""Retrieval against scikit-learn and loops."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from subspace_jax import metrics
from tests.tolerances import tolerance


def embeddings(count, features=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, features)).astype(np.float32), rng.integers(0, classes, count)


@pytest.mark.parametrize("same_set", [False, True])
def test_against_scikit_learn(same_set):
    queries, query_labels = embeddings(23)
    gallery, labels = (queries, query_labels) if same_set else embeddings(31, seed=1)
    scores = metrics.retrieval_scores(queries, query_labels, gallery, labels, ks=(1, 3, 20), same_set=same_set, block=7)
    normal = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, gallery)]
    similarity = normal[0] @ normal[1].T
    kept = ~np.eye(23, dtype=bool) if same_set else np.ones_like(similarity, bool)
    precisions = [
        average_precision_score(labels[kept[i]] == query_labels[i], similarity[i][kept[i]]) for i in range(23)
    ]
    np.testing.assert_allclose(scores.mean_average_precision, np.mean(precisions), rtol=1e-5)
    nearest = NearestNeighbors(n_neighbors=len(gallery), metric="cosine").fit(normal[1]).kneighbors(normal[0])[1]
    for k, found in zip((1, 3, 20), scores.cmc, strict=True):
        hits = []
        for i in range(23):
            ranked = [j for j in nearest[i] if kept[i, j]]
            hits.append(any(labels[j] == query_labels[i] for j in ranked[:k]))
        np.testing.assert_allclose(found, np.mean(hits), rtol=tolerance())
    assert scores.valid == 23


def test_invariances():
    queries, query_labels = embeddings(12)
    gallery, labels = embeddings(15, seed=1)
    plain = metrics.retrieval_scores(queries, query_labels, gallery, labels)
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    order = rng.permutation(15)
    lengths = rng.uniform(0.5, 2.0, size=(15, 1)).astype(np.float32)
    moved = metrics.retrieval_scores(queries @ turn, query_labels, (lengths * gallery @ turn)[order], labels[order])
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_one_match_at_rank_r_gives_its_inverse():
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]], np.float32)
    for rank in range(1, 5):
        labels = np.array([1 if i == rank - 1 else 0 for i in range(4)])
        scores = metrics.retrieval_scores(gallery[:1], np.array([1]), gallery, labels, ks=(1, 4))
        np.testing.assert_allclose(scores.mean_average_precision, 1 / rank, rtol=tolerance())
        assert scores.cmc.tolist() == [float(rank == 1), 1.0]


def test_cut_lists():
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]], np.float32)
    labels = np.array([0, 1, 1, 1])
    scores = metrics.retrieval_scores(gallery[:1], np.array([1]), gallery, labels, ks=(1,), top=2)
    np.testing.assert_allclose(scores.mean_average_precision, (1 / 2) / 2, rtol=tolerance())


def test_queries_without_a_match_do_not_count():
    queries, _ = embeddings(4)
    scores = metrics.retrieval_scores(queries, np.array([0, 0, 9, 9]), queries, np.array([0, 0, 1, 1]), ks=(1,))
    assert scores.valid == 2
    assert scores.cmc[0] == 1.0
    nothing = metrics.retrieval_scores(queries, np.full(4, 9), queries, np.zeros(4, int), ks=(1,))
    assert np.isnan(nothing.mean_average_precision)


def test_equal_items_keep_the_gallerys_order():
    same = np.ones((3, 2), np.float32)
    scores = metrics.retrieval_scores(same[:1], np.array([1]), same, np.array([0, 1, 1]), ks=(1, 2))
    assert scores.cmc.tolist() == [0.0, 1.0]


def test_class_means():
    features, labels = embeddings(20, classes=3)
    means = metrics.class_means(features, labels, 3)
    normal = features / np.linalg.norm(features, axis=1, keepdims=True)
    for c in range(3):
        mean = normal[labels == c].mean(0)
        np.testing.assert_allclose(means[c], mean / np.linalg.norm(mean), rtol=1e-4)


def test_bad_lists_are_refused():
    queries, labels = embeddings(4)
    with pytest.raises(ValueError, match="expected 1 to the gallery's 4"):
        metrics.retrieval_scores(queries, labels, queries, labels, ks=(5,))
    with pytest.raises(ValueError, match="same_set"):
        metrics.retrieval_scores(queries[:2], labels[:2], queries, labels, ks=(1,), same_set=True)
