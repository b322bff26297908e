import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg

from benchmarks._compilations import compilations
from subspace_jax.linalg import fix_signs, polar, product_svd, randomized_svd, truncated_svd, wide_dtype


def decaying(rng, m, n, power):
    """A matrix with singular values i^-power."""
    k = min(m, n)
    u, v = np.linalg.qr(rng.normal(size=(m, k)))[0], np.linalg.qr(rng.normal(size=(n, k)))[0]
    return (u * np.arange(1, k + 1) ** -power) @ v.T


def product(svd):
    return np.asarray(svd.u * svd.s[..., None, :] @ svd.vt)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_truncated_svd_is_numpys_truncation(shape, rank):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    found = truncated_svd(jnp.asarray(w), rank)
    assert found.u.shape == (shape[0], rank)
    assert found.vt.shape == (rank, shape[1])
    np.testing.assert_allclose(found.s, s[:rank], rtol=1e-5)
    np.testing.assert_allclose(product(found), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5 * s[0])


@pytest.mark.parametrize(("inputs", "rank", "outputs"), [(20, 4, 12), (5, 9, 7), (6, 6, 6)])
def test_svd_of_a_product_is_numpys_whatever_the_factors(inputs, rank, outputs):
    rng = np.random.default_rng(5)
    left, right = rng.normal(size=(2, inputs, rank)), rng.normal(size=(2, rank, outputs))
    gauge = rng.normal(size=(rank, rank)) + 3 * np.eye(rank)
    s = np.linalg.svd(left @ right, compute_uv=False)[:, : min(inputs, rank, outputs)]
    found = product_svd(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    assert found.s.shape == s.shape
    np.testing.assert_allclose(found.s, s, atol=1e-5 * s.max())
    np.testing.assert_allclose(product(found), left @ right, atol=1e-5 * s.max())
    other = product_svd(jnp.asarray(left @ gauge, jnp.float32), jnp.asarray(np.linalg.inv(gauge) @ right, jnp.float32))
    np.testing.assert_allclose(other.u, found.u, atol=1e-3)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("oversample", [0, 8])
def test_randomized_svd_finds_the_subspace_that_scipy_finds(shape, oversample):
    w = decaying(np.random.default_rng(1), *shape, 1.0)
    u, s, vt = scipy.sparse.linalg.svds(w, k=6, random_state=np.random.default_rng(0))
    iterations = 30 if oversample == 0 else 10
    found = randomized_svd(jax.random.key(0), jnp.asarray(w), 6, iterations=iterations, oversample=oversample)
    np.testing.assert_allclose(found.s, np.sort(s)[::-1], rtol=1e-4)
    assert np.rad2deg(scipy.linalg.subspace_angles(np.asarray(found.u), u)).max() < 1.0
    assert np.rad2deg(scipy.linalg.subspace_angles(np.asarray(found.vt).T, vt.T)).max() < 1.0


def test_power_iterations_and_extra_columns_sharpen_the_result():
    w = decaying(np.random.default_rng(2), 80, 80, 0.5)
    best = np.sqrt(np.sum(np.arange(9, 81) ** -1.0))

    def excess(**options):
        found = randomized_svd(jax.random.key(1), jnp.asarray(w), 8, **options)
        return np.linalg.norm(w - product(found)) / best - 1

    none, few, many = (excess(iterations=n, oversample=0) for n in (0, 2, 16))
    assert none > few > many > -1e-5
    assert excess(iterations=0, oversample=32) < none
    assert excess(iterations=16, oversample=8) < 1e-3


def test_stacked_matrices_are_decomposed_one_by_one():
    w = np.random.default_rng(3).normal(size=(2, 3, 9, 7)).astype(np.float32)
    for found in (truncated_svd(jnp.asarray(w), 7), randomized_svd(jax.random.key(0), jnp.asarray(w), 7)):
        assert found.s.shape == (2, 3, 7)
        np.testing.assert_allclose(found.s, np.linalg.svd(w, compute_uv=False), rtol=1e-4)
        np.testing.assert_allclose(product(found), w, atol=1e-5)


@pytest.mark.parametrize("svd", [truncated_svd, lambda w, r: randomized_svd(jax.random.key(0), w, r)])
def test_bfloat16_is_decomposed_in_float32(svd):
    w = jnp.asarray(np.random.default_rng(4).normal(size=(12, 8)), jnp.bfloat16)
    found = svd(w, 8)
    assert {x.dtype for x in found} == {jnp.dtype("float32")}
    np.testing.assert_allclose(product(found), np.asarray(w, np.float32), atol=1e-5)


def test_the_polar_factor_of_bfloat16_is_orthogonal_in_float32():
    found = polar(jnp.asarray(np.random.default_rng(6).normal(size=(5, 3)), jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)


def test_float64_is_decomposed_in_float64():
    w = np.random.default_rng(5).normal(size=(12, 8))
    with jax.enable_x64(True):
        found = truncated_svd(jnp.asarray(w), 8)
        assert found.s.dtype == jnp.float64
        np.testing.assert_allclose(product(found), w, atol=1e-13)
    assert wide_dtype(jnp.float16) == wide_dtype(jnp.bfloat16) == jnp.float32


def test_the_rank_of_a_deficient_matrix_shows_as_zeros():
    rng = np.random.default_rng(6)
    w = jnp.asarray(rng.normal(size=(20, 3)) @ rng.normal(size=(3, 16)), jnp.float32)
    for found in (truncated_svd(w, 6), randomized_svd(jax.random.key(0), w, 6)):
        assert np.isfinite(product(found)).all()
        assert float(jnp.max(found.s[3:])) < 1e-5 * float(found.s[0])


def test_signs_do_not_depend_on_those_of_the_decomposition():
    rng = np.random.default_rng(7)
    u, vt = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 4, 5))
    flips = np.array([1.0, -1.0, -1.0, 1.0])
    first = fix_signs(jnp.asarray(u), jnp.asarray(vt))
    second = fix_signs(jnp.asarray(u * flips), jnp.asarray(vt * flips[:, None]))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    largest = np.take_along_axis(np.asarray(first[0]), np.abs(u).argmax(-2)[:, None, :], axis=-2)
    assert (largest > 0).all()
    np.testing.assert_allclose(first[0] @ first[1], u @ vt, atol=1e-5)


@pytest.mark.parametrize("svd", [truncated_svd, lambda w, r: randomized_svd(jax.random.key(0), w, r)])
def test_a_second_matrix_of_one_shape_compiles_nothing(svd):
    """Adapters are started outside jit, kernel by kernel: a program for each would take most of the time."""
    w = np.random.default_rng(8).normal(size=(2, 11, 7)).astype(np.float32)
    first, second = jnp.asarray(w[0]), jnp.asarray(w[1])
    svd(first, 3)
    with compilations() as found:
        svd(second, 3)
        assert not found
        svd(second, 4)
        assert found  # the measure sees compilations


@pytest.mark.optimized
def test_power_iterations_hold_the_matrix_once():
    """A transposed copy, and those that a loop makes of both, took three times the matrix."""
    shape = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    program = jax.jit(lambda w: randomized_svd(jax.random.key(0), jnp.sign(w), 4))
    memory = program.lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * 512 * 1024
