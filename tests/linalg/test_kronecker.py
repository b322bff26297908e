"""Kronecker decompositions against numpy's own products and decompositions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.linalg import (
    KroneckerSplit,
    balanced_split,
    kronecker_rows,
    kronecker_sum,
    kronecker_svd,
    rearrange,
    unrearrange,
)

SPLITS = [
    KroneckerSplit(3, 4, 5, 2),
    KroneckerSplit(4, 3, 2, 5),
    KroneckerSplit(1, 12, 5, 2),
    KroneckerSplit(12, 1, 1, 10),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(split):
    return split.m * split.p, split.n * split.q


def formed(scales, left, right):
    """The sum of each layer, by numpy's Kronecker product."""
    layers = zip(scales, left, right, strict=True)
    return np.stack([sum(s * np.kron(a, b) for s, a, b in zip(*layer, strict=True)) for layer in layers])


@pytest.mark.parametrize("split", SPLITS)
def test_rearrangement_makes_a_product_an_outer_product_of_row_major_vectors(split):
    a, b = normal(split.m, split.n), normal(split.p, split.q, seed=1)
    np.testing.assert_array_equal(rearrange(jnp.asarray(np.kron(a, b)), split), np.outer(a.ravel(), b.ravel()))


@pytest.mark.parametrize("split", SPLITS)
def test_rearrangement_only_moves_entries_and_back(split):
    w = normal(2, *whole(split))
    moved = rearrange(jnp.asarray(w), split)
    assert moved.shape == (2, split.m * split.n, split.p * split.q)
    np.testing.assert_array_equal(np.sort(np.ravel(moved)), np.sort(w.ravel()))
    np.testing.assert_array_equal(unrearrange(moved, split), w)


@pytest.mark.parametrize("split", SPLITS)
def test_terms_are_best_orthogonal_and_complete(split):
    w = normal(*whole(split))
    found = kronecker_svd(jnp.asarray(w), split, split.terms)
    left, s, right = (np.asarray(v) for v in found)
    reference = np.linalg.svd(np.asarray(rearrange(jnp.asarray(w), split)), compute_uv=False)
    np.testing.assert_allclose(s, reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(left, axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(right, axis=(1, 2)), 1, rtol=1e-5)
    partial = np.zeros_like(w)
    for r in range(split.terms):
        partial = partial + s[r] * np.kron(left[r], right[r])
        np.testing.assert_allclose(np.linalg.norm(w - partial), np.sqrt((s[r + 1 :] ** 2).sum()), atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(partial) ** 2, (s[: r + 1] ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(partial, w, atol=1e-5)


def test_no_alternating_least_squares_beats_the_first_term():
    split = KroneckerSplit(3, 4, 5, 2)
    w = normal(*whole(split)).astype(np.float64)
    found = kronecker_svd(jnp.asarray(w), split, 1)
    error = np.linalg.norm(w - float(found.s[0]) * np.kron(found.left[0], found.right[0]))
    blocks = w.reshape(split.m, split.p, split.n, split.q)
    for seed in range(5):
        b = np.random.default_rng(seed).normal(size=(split.p, split.q))
        for _ in range(200):
            a = np.einsum("mpnq,pq->mn", blocks, b) / (b**2).sum()
            b = np.einsum("mpnq,mn->pq", blocks, a) / (a**2).sum()
        assert error <= np.linalg.norm(w - np.kron(a, b)) + 1e-5


def test_columns_and_rows_as_factors_give_the_ordinary_svd():
    w = normal(6, 9)
    found = kronecker_svd(jnp.asarray(w), KroneckerSplit(6, 1, 1, 9), 3)
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(found.s, s[:3], rtol=1e-5)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(kronecker_sum(found.s, found.left, found.right), best, atol=1e-5)


def test_randomized_decomposition_finds_planted_terms_in_a_stack():
    split = KroneckerSplit(8, 8, 8, 8)
    factors = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    planted = np.stack(
        [sum(np.kron(a, b) for a, b in zip(*layer, strict=True)) for layer in zip(*factors, strict=True)]
    )
    noisy = planted + 1e-3 * normal(*planted.shape, seed=2)
    found = kronecker_svd(jnp.asarray(noisy), split, 3, key=jax.random.key(0))
    again = np.asarray(kronecker_sum(found.s, found.left, found.right))
    assert np.linalg.norm(again - planted) < 2e-3 * np.linalg.norm(planted)


@pytest.mark.parametrize("split", SPLITS)
def test_sum_and_rows_are_those_of_numpys_products(split):
    left, right, scales = normal(2, 3, split.m, split.n), normal(2, 3, split.p, split.q, seed=1), normal(2, 3, seed=2)
    expected = formed(scales, left, right)
    np.testing.assert_allclose(kronecker_sum(scales, left, right), expected, atol=1e-5)
    x = normal(2, 7, split.m * split.p, seed=3)
    np.testing.assert_allclose(kronecker_rows(jnp.asarray(x), scales, left, right), x @ expected, atol=1e-4)


def test_rows_take_the_cheap_order():
    def cost(split, terms=2, rows=16):
        shapes = (rows, split.m * split.p), (terms,), (terms, split.m, split.n), (terms, split.p, split.q)
        run = jax.jit(kronecker_rows).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
        found = run.compile().cost_analysis()
        m, p, n, q = split
        return found["flops"], 2 * rows * terms * min(m * p * q + m * n * q, m * n * p + n * p * q)

    for split in (KroneckerSplit(8, 8, 8, 64), KroneckerSplit(8, 64, 8, 8), KroneckerSplit(64, 8, 8, 8)):
        flops, expected = cost(split)
        assert flops < 1.1 * expected


def test_default_split_of_usual_sizes():
    assert balanced_split(64, 128) == (8, 8, 8, 16)
    assert balanced_split(4096, 4096) == (64, 64, 64, 64)
    assert balanced_split(4096, 11008) == (64, 64, 86, 128)
    assert balanced_split(768, 3072) == (24, 32, 64, 48)
    m, p, n, q = balanced_split(7, 13)
    assert (m * p, n * q) == (7, 13)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 18), (30, 8), (7, 12), (1, 6)])
def test_default_split_has_the_fewest_values(inputs, outputs):
    m, p, n, q = balanced_split(inputs, outputs)
    assert (m * p, n * q) == (inputs, outputs)
    pairs = [
        (i, j) for i in range(1, inputs + 1) for j in range(1, outputs + 1) if inputs % i == 0 and outputs % j == 0
    ]
    assert m * n + p * q == min(i * j + inputs * outputs // (i * j) for i, j in pairs)
