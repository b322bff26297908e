"""Scores of detection against scikit-learn and a loop over thresholds."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import precision_recall_curve, roc_auc_score

from subspace_jax import metrics


def case(shape, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.random(shape) < 0.3
    scores = rng.normal(size=shape) + labels
    return (np.round(scores) if ties else scores), labels


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_f1_are_scikit_learns(ties):
    scores, labels = case((4, 50), ties=ties)
    np.testing.assert_allclose(metrics.auroc(scores, labels), roc_auc_score(labels.ravel(), scores.ravel()), rtol=1e-12)
    precision, recall, _ = precision_recall_curve(labels.ravel(), scores.ravel())
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    np.testing.assert_allclose(metrics.f1_max(scores, labels), best, rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_aupro_is_the_area_over_all_thresholds(ties, limit):
    maps, masks = case((3, 8, 9), 1, ties)
    regions = []
    for i, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(i, labels == k) for k in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        rates.append(hit[~masks].mean())
        overlaps.append(np.mean([hit[i][region].mean() for i, region in regions]))
    area = 0.0
    for i in range(1, len(rates)):
        (r0, r1), (o0, o1) = rates[i - 1 : i + 1], overlaps[i - 1 : i + 1]
        if r0 < limit:
            stop = min(r1, limit)
            end = o0 + (o1 - o0) * ((stop - r0) / (r1 - r0) if r1 > r0 else 1.0)
            area += (stop - r0) * (o0 + end) / 2
    np.testing.assert_allclose(metrics.aupro(maps, masks, limit), area / limit, rtol=1e-10)


def test_small_defects_count_as_much_as_large_ones_and_corners_touch():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, :4, :4] = True
    masks[0, 6, 6] = masks[0, 7, 7] = True  # one region: they touch at a corner
    maps = np.zeros((1, 8, 8))
    maps[0, 6, 6] = maps[0, 7, 7] = 1.0
    # Half of the regions is found at once; the rest only with all normal pixels: a line from 1/2 to 1.
    np.testing.assert_allclose(metrics.aupro(maps, masks, 0.3), 0.5 + 0.5 * 0.3 / 2)


@pytest.mark.parametrize("function", [metrics.auroc, metrics.f1_max, metrics.aupro])
def test_what_has_no_curve_is_refused(function):
    scores, labels = case((2, 5, 5))
    with pytest.raises(ValueError, match="expected anomalous"):
        function(scores, np.zeros_like(labels))
    with pytest.raises(ValueError, match="expected normal"):
        function(scores, np.ones_like(labels))
    with pytest.raises(ValueError, match="one shape"):
        function(scores[:1], labels)
    with pytest.raises(ValueError, match="NaN"):
        function(scores * np.nan, labels)


def test_aupro_wants_maps_and_a_rate():
    with pytest.raises(ValueError, match="height, width"):
        metrics.aupro([0.0, 1.0], [False, True])
    with pytest.raises(ValueError, match="limit=0"):
        metrics.aupro(*case((2, 5, 5)), limit=0)
