"""The largest entries against a stable sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._compilations import compilations
from subspace_jax.weights import largest_entries


def brute(scores, count):
    return np.sort(np.argsort(-scores, kind="stable")[:count])


@pytest.mark.parametrize("count", [0, 1, 7, 40, 100])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_agrees_with_a_stable_sort_where_scores_are_equal(count, levels):
    scores = (np.random.default_rng(count).integers(0, levels, 100) / 7).astype(np.float32)
    found = jax.jit(largest_entries, static_argnums=1)(jnp.asarray(scores), count)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, brute(scores, count))


def test_stack_is_served_row_by_row_and_extremes_are_ordered():
    rows = np.array([[0.0, 1e-40, 3e38, -0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]], np.float32)
    found = largest_entries(jnp.asarray(rows).reshape(2, 1, 5), 3)
    assert found.tolist() == [[[1, 2, 4]], [[0, 1, 2]]]


@pytest.mark.parametrize("shape", [(6, 7), (1, 42), (42, 1), (8, 8)])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_matrices_are_counted_row_by_row(shape, levels):
    scores = (np.random.default_rng(0).integers(0, levels, (2, *shape)) / 7).astype(np.float32)
    scores[1, -1] = scores.max()  # a full row, after rows with few
    for count in (1, 13, 41):
        found = largest_entries(jnp.asarray(scores), count, axes=2)
        np.testing.assert_array_equal(found, [brute(layer.ravel(), count) for layer in scores])


def test_count_beyond_the_scores_is_refused():
    with pytest.raises(ValueError, match="count=6 of 5"):
        largest_entries(jnp.ones(5), 6)


def test_a_second_array_of_one_shape_compiles_nothing():
    rows = jnp.asarray(np.random.default_rng(1).random((2, 9, 4), np.float32))
    first, second = rows[0], rows[1]
    largest_entries(first, 3, axes=2)
    with compilations() as found:
        largest_entries(second, 3, axes=2)
    assert not found
