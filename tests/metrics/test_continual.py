"""Scores of a stream against loops over the definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from subspace_jax import metrics
from tests.tolerances import tolerance

R = np.array([[0.9, 0.2, 0.3], [0.8, 0.85, 0.25], [0.7, 0.8, 0.95]])
BASE = np.array([0.1, 0.1, 0.1])
matrices = st.integers(2, 5).flatmap(lambda n: arrays(np.float32, (n, n), elements=st.floats(0, 1, width=32)))


def test_the_worked_example():
    np.testing.assert_allclose(metrics.accuracy_curve(R), [0.9, 0.825, 0.8166667], rtol=1e-5)
    scores = metrics.multi_domain_scores(R)
    for found, expected in (
        (metrics.average_accuracy(R), 0.8166667),
        (metrics.incremental_accuracy(R), 0.8472222),
        (metrics.backward_transfer(R), -0.125),
        (metrics.forgetting(R), 0.125),
        (metrics.forward_transfer(R, BASE), 0.125),
        (scores.transfer, 0.2375),
        (scores.average, 0.6388889),
        (scores.last, 0.8166667),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(matrices)
def test_definitions_by_loops(matrix):
    tasks = len(matrix)
    wide = matrix.astype(np.float64)
    backward = np.mean([wide[-1, i] - wide[i, i] for i in range(tasks - 1)])
    best = [max(wide[t, i] for t in range(i, tasks - 1)) for i in range(tasks - 1)]
    forgot = np.mean([best[i] - wide[-1, i] for i in range(tasks - 1)])
    transfer = np.mean([np.mean([wide[t, i] for t in range(i)]) for i in range(1, tasks)])
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(metrics.backward_transfer(matrix), backward, **close)
    np.testing.assert_allclose(metrics.forgetting(matrix), forgot, **close)
    np.testing.assert_allclose(metrics.multi_domain_scores(matrix).transfer, transfer, **close)
    # Identities of the definitions.
    accuracy = metrics.learning_accuracy(matrix) + (tasks - 1) / tasks * metrics.backward_transfer(matrix)
    np.testing.assert_allclose(metrics.average_accuracy(matrix), accuracy, **close)
    assert metrics.forgetting(matrix) >= -metrics.backward_transfer(matrix) - 1e-5
    np.testing.assert_allclose(metrics.multi_domain_scores(matrix).average, wide.mean(), **close)


def test_a_constant_matrix():
    constant = np.full((4, 4), 0.3)
    assert metrics.backward_transfer(constant) == metrics.forgetting(constant) == 0
    np.testing.assert_allclose(metrics.forward_transfer(constant, [0.9, 0.1, 0.2, 0.3]), 0.1, atol=tolerance(size=4))


def test_the_last_row_does_not_count_as_best():
    rising = np.array([[0.5, np.nan], [0.9, 0.5]])
    np.testing.assert_allclose(metrics.forgetting(rising), -0.4, rtol=tolerance())


def test_missing_entries_matter_only_where_they_are_needed():
    lower = np.where(np.tril(np.ones((3, 3))) > 0, R, np.nan)
    np.testing.assert_allclose(metrics.backward_transfer(lower), -0.125, rtol=1e-5)
    np.testing.assert_allclose(metrics.forgetting(lower), 0.125, rtol=1e-5)
    np.testing.assert_allclose(metrics.average_accuracy(lower), 0.8166667, rtol=1e-5)
    assert np.isnan(metrics.forward_transfer(lower, BASE))
    assert np.isnan(metrics.multi_domain_scores(lower).transfer)
    unfinished = np.where(np.arange(3)[:, None] < 2, R, np.nan)
    assert np.isnan(metrics.backward_transfer(unfinished))


def test_zero_is_a_score():
    np.testing.assert_allclose(metrics.average_accuracy([[1.0, 0.0], [0.0, 0.5]]), 0.25)


def test_forgetting_at_an_earlier_time():
    np.testing.assert_allclose(metrics.forgetting(R, 1), 0.1, rtol=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        metrics.forgetting(R, 3)


def test_pooled_accuracy_weighs_by_examples():
    counts = np.array([10, 30, 60])
    np.testing.assert_allclose(metrics.accuracy_curve(R, counts)[1], (10 * 0.8 + 30 * 0.85) / 40, rtol=1e-5)


def test_ratios_and_differences():
    np.testing.assert_allclose(metrics.normalized_accuracy([0.4, 0.9], [0.8, 0.9]), 0.75, rtol=tolerance())
    np.testing.assert_allclose(metrics.intransigence(R, [1.0, 1.0, 1.0]), 0.1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (1, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[tasks, tasks\]"):
        metrics.backward_transfer(np.zeros(shape))
