"""Numbers of terms against spectra whose answer is known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.linalg import KroneckerSplit, count_terms, elbow_terms, energy_terms, kronecker_svd

STEP = np.array([10.0, 9.0, 8.0] + 61 * [0.1], np.float32)
HYPERBOLA = (1.0 / np.arange(1, 65)).astype(np.float32)


def test_elbow_of_known_spectra():
    assert int(elbow_terms(jnp.asarray(STEP))) == 3
    assert int(elbow_terms(jnp.asarray(HYPERBOLA))) == 7
    assert int(elbow_terms(jnp.full(5, 2.0))) == 5
    assert int(elbow_terms(jnp.ones(1))) == 1
    assert int(elbow_terms(jnp.zeros(4))) == 4


def test_elbow_is_the_brute_force_one():
    for seed in range(20):
        s = np.sort(np.random.default_rng(seed).gamma(0.5, size=12))[::-1].astype(np.float32)
        x, y = np.arange(12) / 11, (s - s[-1]) / (s[0] - s[-1])
        assert int(elbow_terms(jnp.asarray(s))) == max(int(np.argmax(1 - x - y)), 1)


def test_elbow_of_the_leading_values_only():
    padded = np.concatenate([STEP, np.zeros(10, np.float32)])
    both = jnp.asarray(np.stack([padded, np.roll(padded, 0)]))
    assert elbow_terms(both, jnp.array([64, 3])).tolist() == [3, int(elbow_terms(jnp.asarray(STEP[:3])))]


def test_energy_is_the_smallest_that_holds_it_and_does_not_fall_with_the_share():
    energy = np.cumsum(HYPERBOLA.astype(np.float64) ** 2)
    found = []
    for share in (0.1, 0.5, 0.9, 0.99, 1.0):
        found.append(int(energy_terms(jnp.asarray(HYPERBOLA), share)))
        assert found[-1] == 1 + int(np.argmax(energy >= (share - 1e-6) * energy[-1]))
    assert found == sorted(found)
    assert len(set(found)) > 3
    # Of a whole twice as large, the leading values do not hold 0.9.
    assert int(energy_terms(jnp.asarray(HYPERBOLA), 0.9, jnp.asarray(2 * energy[-1]))) == 64


@pytest.mark.parametrize("terms", [1, 3, 6])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_both_criteria_find_the_number_of_planted_terms(terms, noise):
    rng = np.random.default_rng(terms)
    planted = sum(np.kron(rng.normal(size=(8, 8)), rng.normal(size=(8, 8))) for _ in range(terms))
    error = rng.normal(size=planted.shape)
    planted = planted + noise * error * np.linalg.norm(planted) / np.linalg.norm(error)
    values = kronecker_svd(jnp.asarray(planted, jnp.float32), KroneckerSplit(8, 8, 8, 8), 64).s
    assert int(energy_terms(values, 0.99)) == terms
    assert int(elbow_terms(values)) == terms


def test_criteria_combine_within_bounds():
    s = jnp.asarray(STEP)
    energy, elbow = int(energy_terms(s, 0.5)), int(elbow_terms(s))
    assert (energy, elbow) == (2, 3)
    counts = [int(count_terms(s, 0.5, combine)) for combine in ("min", "max", "energy", "elbow")]
    assert counts == [2, 3, 2, 3]
    assert int(count_terms(s, 0.5, "max", most=2)) == 2
    assert int(count_terms(s, 0.5, "min", least=5)) == 5
    assert count_terms(jnp.stack([s, jnp.asarray(HYPERBOLA)]), 0.99, "elbow").tolist() == [3, 7]
