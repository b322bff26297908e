"""The cosine transform against scipy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from subspace_jax.linalg import (
    best_cosine_terms,
    compare_residuals,
    cosine_matrix,
    cosine_transform,
    cosine_vectors,
    inverse_cosine_transform,
)
from tests.tolerances import tolerance


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 513])
def test_matrix_is_scipys_and_orthonormal(size):
    found = np.asarray(cosine_matrix(size), np.float64)
    np.testing.assert_allclose(found, scipy.fft.dct(np.eye(size), axis=0, norm="ortho"), atol=tolerance(size=4))
    np.testing.assert_allclose(found @ found.T, np.eye(size), atol=tolerance(size=4))


@pytest.mark.parametrize("size", [4096, 40_000, 300_000])
def test_high_frequencies_of_long_vectors_keep_their_digits(size):
    index = np.array([1, size // 3, size - 2, size - 1])
    odd = 2 * np.arange(size, dtype=np.int64) + 1
    # Reduced in 64-bit integers, then in float64.
    angle = (index[:, None] * odd % (4 * size)) * (np.pi / (2 * size))
    found = cosine_vectors(jnp.asarray(index), size)
    np.testing.assert_allclose(
        found, np.sqrt(2.0 / size) * np.cos(angle), atol=tolerance(size=4) * np.sqrt(2.0 / size) * 2
    )


@pytest.mark.parametrize("fft", [True, False])
@pytest.mark.parametrize("shape", [(12, 7), (8, 8), (1, 5)])
def test_transforms_are_scipys_and_inverse(shape, fft):
    w = normal(*shape)
    spectrum = cosine_transform(jnp.asarray(w), fft=fft)
    np.testing.assert_allclose(spectrum, scipy.fft.dctn(w, norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(inverse_cosine_transform(spectrum, fft=fft), w, atol=1e-5)
    np.testing.assert_allclose(
        inverse_cosine_transform(jnp.asarray(w), fft=fft), scipy.fft.idctn(w, norm="ortho"), atol=1e-5
    )


def test_best_terms_leave_the_energy_of_the_others():
    w = normal(9, 14)
    energy = np.sort(scipy.fft.dctn(w, norm="ortho").ravel() ** 2)[::-1]
    for count in (1, 20, 126):
        approximation, missing = best_cosine_terms(jnp.asarray(w), count)
        np.testing.assert_allclose(missing, energy[count:].sum() / energy.sum(), atol=1e-5)
        np.testing.assert_allclose(np.sum((w - approximation) ** 2) / np.sum(w**2), missing, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [((32, 48), 1, (0.72, 0.905, 0.948)), ((64, 64), 2, (0.67, 0.89, 0.94)), ((64, 64), 8, (0.28, 0.62, 0.75))],
)
def test_gaussian_changes_are_held_best_by_located_cosines_and_least_by_random_ones(shape, rank, expected):
    drawn = [compare_residuals(jax.random.key(s), jnp.asarray(normal(*shape, seed=s)), rank) for s in range(4)]
    found = np.mean(drawn, axis=0)
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert found[1] - found[0] >= 0.1
    assert found[2] - found[1] >= 0.03
