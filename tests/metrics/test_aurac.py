"""AURAC against numpy's trapezoids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax.metrics import aurac

curves = st.lists(st.tuples(st.integers(1, 512), st.floats(0, 1)), min_size=2, max_size=9, unique_by=lambda p: p[0])


def test_figures_of_the_publication():
    ranks, accuracies = (1, 2, 4, 8, 16), (10, 20, 40, 50, 55)
    assert aurac(ranks, accuracies) == 35.625
    assert aurac(ranks, accuracies, log=False) == 45.0


@given(curves)
def test_is_the_normalized_area(points):
    ranks, accuracies = zip(*sorted(points), strict=True)
    for log in (True, False):
        x = np.log2(ranks) if log else np.asarray(ranks, float)
        found = aurac(ranks, accuracies, log=log)
        np.testing.assert_allclose(found, np.trapezoid(accuracies, x) / (x[-1] - x[0]), rtol=1e-9, atol=1e-12)
        assert min(accuracies) - 1e-9 <= found <= max(accuracies) + 1e-9


def test_a_point_on_the_curve_changes_nothing():
    assert aurac((1, 2, 4), (0.2, 0.3, 0.4)) == pytest.approx(aurac((1, 4), (0.2, 0.4)))
    assert aurac((1, 2, 3), (0.2, 0.3, 0.4), log=False) == pytest.approx(aurac((1, 3), (0.2, 0.4), log=False))


def test_one_rank_is_its_accuracy():
    assert aurac((4,), (0.7,)) == 0.7


@pytest.mark.parametrize("ranks", [(0, 1), (2, 1), (1, 1), ()])
def test_bad_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="aurac"):
        aurac(ranks, [0.5] * len(ranks))


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one accuracy for each rank"):
        aurac((1, 2), (0.5,))
