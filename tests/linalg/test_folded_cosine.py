"""The folded cosine transform against scipy's, and its operations against those of the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from subspace_jax.linalg import cosine_matrix, cosine_rows, cosine_transform, inverse_cosine_transform, transform_share

# Odd, short, folded once, folded down to an odd length, and folded again and again.
SIZES = (1, 7, 62, 64, 66, 96, 384, 1000, 1024)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rows_are_transformed_as_scipy_does(size, inverse):
    rows = np.random.default_rng(size).normal(size=(3, 2, size))
    expected = (scipy.fft.idct if inverse else scipy.fft.dct)(rows, type=2, norm="ortho", axis=-1)
    actual = cosine_rows(jnp.asarray(rows, jnp.float32), inverse=inverse)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_matrices_are_transformed_as_scipy_does():
    matrix = np.random.default_rng(0).normal(size=(128, 96))
    array = jnp.asarray(matrix, jnp.float32)
    np.testing.assert_allclose(cosine_transform(array, fft=False), scipy.fft.dctn(matrix, norm="ortho"), atol=2e-5)
    there = inverse_cosine_transform(array, fft=False)
    np.testing.assert_allclose(there, scipy.fft.idctn(matrix, norm="ortho"), atol=2e-5)


def test_the_derivative_is_the_inverse():
    rows, cotangent = (jax.random.normal(jax.random.key(i), (4, 128)) for i in (0, 1))
    found = jax.vjp(cosine_rows, rows)[1](cotangent)[0]
    np.testing.assert_allclose(found, np.asarray(cotangent) @ np.asarray(cosine_matrix(128)), atol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(("size", "share"), [(384, 0.35), (576, 0.35), (1024, 0.35)])
def test_operations_are_half_of_the_plain_product_s_at_most(size, share):
    rows = jax.ShapeDtypeStruct((256, size), jnp.float32)
    plain = jax.jit(lambda v: v @ cosine_matrix(size).T).lower(rows).compile().cost_analysis()["flops"]
    folded = jax.jit(cosine_rows).lower(rows).compile().cost_analysis()["flops"]
    assert transform_share(size) < share
    # The matrices themselves are made of cosines and folded by the compiler; sums of halves are counted as well.
    assert folded <= 0.53 * plain
