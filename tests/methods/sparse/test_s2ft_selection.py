"""Shares of heads and channels: counts, draws and scores."""

from __future__ import annotations

import numpy as np
import pytest

from subspace_jax.methods.sparse.s2ft import select_units, slots_of


@pytest.mark.parametrize(
    ("shape", "layers", "ratio", "count"),
    [((32,), 32, 0.052, 53), ((11008,), 32, 0.02, 7045), ((14336,), 32, 0.03, 13762), ((8,), 3, 0.0, 0)],
)
def test_counts_are_the_published_ones(shape, layers, ratio, count):
    masks = select_units({f"layer_{i}": shape for i in range(layers)}, ratio)
    assert sum(int(m.sum()) for m in masks.values()) == count == int(shape[0] * layers * ratio)
    stacked = select_units({"layers": (layers, *shape)}, ratio)["layers"]
    assert stacked.shape == (layers, *shape)
    assert stacked.sum() == count


def test_published_parameter_counts():
    assert 53 * 128 * 4096 + 7045 * 4096 == 56_643_584
    assert 13762 * 4096 == 56_369_152


def test_layers_get_different_numbers_unless_they_shall_be_equal():
    shapes = {str(i): (50,) for i in range(8)}
    assert len({int(m.sum()) for m in select_units(shapes, 0.2).values()}) > 1
    equal = select_units({**shapes, "stacked": (2, 50)}, 0.21, per_layer="equal")
    assert {int(n) for m in equal.values() for n in np.atleast_1d(m.sum(-1))} == {round(0.21 * 50)}


def test_draws_are_uniform_deterministic_and_differ_between_seeds_and_weights():
    shapes = {"a": (10,), "b": (10,)}
    draws = np.mean([np.concatenate(list(select_units(shapes, 0.3, seed=s).values())) for s in range(400)], axis=0)
    np.testing.assert_allclose(draws, 0.3, atol=0.1)
    np.testing.assert_array_equal(select_units(shapes, 0.3)["a"], select_units(shapes, 0.3)["a"])
    assert not np.array_equal(select_units({"v": (32,)}, 0.3)["v"], select_units({"o": (32,)}, 0.3)["o"])


@pytest.mark.parametrize("largest", [True, False])
def test_scores_decide_over_all_layers_together_or_layer_by_layer(largest):
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((2, 6)), "b": 10 * rng.random(6)}
    shapes = {path: s.shape for path, s in scores.items()}
    flat = np.concatenate([s.ravel() for s in scores.values()])
    taken = np.argsort(-flat if largest else flat)[:5]
    found = np.concatenate([m.ravel() for m in select_units(shapes, 0.3, scores=scores, largest=largest).values()])
    assert set(np.flatnonzero(found)) == set(taken)
    each = select_units(shapes, 0.5, scores=scores, largest=largest, per_layer="equal")
    for layer, mask in zip((*scores["a"], scores["b"]), (*each["a"], each["b"]), strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-layer if largest else layer)[:3])


def test_slots_pad_to_the_largest_layer():
    positions, start, slots = slots_of(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool))
    assert (positions.tolist(), start, slots) == ([[1, 3], [4, 4], [2, 4]], 0, 2)
    assert slots_of(np.zeros((2, 4), bool)) == (None, 0, 0)
    assert slots_of(np.array([[0, 1, 1], [0, 1, 1]], bool)) == (None, 1, 2)
    assert slots_of(np.array([[0, 1, 1], [1, 1, 0]], bool))[0] is not None


def test_bad_shares_and_scores_are_refused():
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        select_units({"a": (4,)}, 1.5)
    with pytest.raises(ValueError, match="a: the scores have shape None"):
        select_units({"a": (4,)}, 0.5, scores={})
    with pytest.raises(ValueError, match=r"a: the scores have shape \(3,\); expected \(4,\)"):
        select_units({"a": (4,)}, 0.5, scores={"a": np.ones(3)})
