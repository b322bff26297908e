"""Compatibility of representations, by hand."""

import numpy as np
import pytest

import subspace_jax.methods.regularized.lambda_orthogonality as scores
from tests.tolerances import tolerance

C = np.array([[0.5, np.nan, np.nan], [0.6, 0.7, np.nan], [0.4, 0.8, 0.9]])


def test_compatibility_by_hand():
    assert scores.is_compatible(C).tolist() == [
        [False] * 3,
        [True, False, False],
        [False, True, False],
    ]
    np.testing.assert_allclose(scores.average_compatibility(C), 2 / 3, rtol=tolerance())
    np.testing.assert_allclose(
        scores.average_multimodel_score(C), (0.5 + 0.6 + 0.7 + 0.4 + 0.8 + 0.9) / 6, rtol=tolerance()
    )
    np.testing.assert_allclose(scores.update_gain(C, 1, 0), 0.5, rtol=1e-5)
    assert np.isnan(scores.update_gain(np.array([[0.5, 0.0], [0.6, 0.4]]), 1, 0))
    assert scores.average_compatibility([[0.3]]) == 1.0
    assert scores.average_compatibility(np.full((3, 3), 0.4)) == 0.0


def test_backfilling_is_the_area():
    curve = [0.2, 0.5, 0.6, 0.9]
    np.testing.assert_allclose(scores.backfilling_score(curve), np.trapezoid(curve, dx=1 / 3), rtol=tolerance())
    np.testing.assert_allclose(scores.backfilling_score([0.4] * 11), 0.4, rtol=tolerance())
    with pytest.raises(ValueError, match="two shares"):
        scores.backfilling_score([0.5])
