"""Skew-symmetric matrices entry by entry, and the Cayley transform against float64 solves and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.linalg import cayley, cayley_neumann, skew, skew_size


def random_skew(size, stack=(), spread=1.0, seed=0):
    entries = spread * np.random.default_rng(seed).normal(size=(*stack, skew_size(size)))
    return skew(jnp.asarray(entries, jnp.float32), size)


def exact(matrix):
    wide, eye = np.asarray(matrix, np.float64), np.eye(matrix.shape[-1])
    return (eye + wide) @ np.linalg.inv(eye - wide)


@pytest.mark.parametrize("stack", [(), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_skew_matrices_have_the_entries_row_by_row(size, dtype, stack):
    entries = jnp.asarray(np.random.default_rng(size).normal(size=(*stack, skew_size(size))), dtype)
    above = (..., *np.triu_indices(size, 1))
    expected = np.zeros((*stack, size, size), np.float32)
    expected[above] = np.asarray(entries, np.float32)
    found = jax.jit(skew, static_argnums=1)(entries, size)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected - np.swapaxes(expected, -1, -2))

    weights = np.random.default_rng(9).normal(size=expected.shape).astype(np.float32)
    gradient = jax.grad(lambda e: jnp.sum(skew(e, size) * weights))(entries.astype(jnp.float32))
    np.testing.assert_allclose(gradient, (weights - np.swapaxes(weights, -1, -2))[above], rtol=1e-6)


def test_an_entry_that_is_not_finite_stays_where_it_is():
    found = np.asarray(skew(jnp.array([np.nan, 1.0, np.inf]), 3))
    assert np.isfinite(found).sum() == 5
    np.testing.assert_array_equal(np.diagonal(found), np.zeros(3))


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_cayley_is_the_exact_rotation(size, spread):
    matrix = random_skew(size, (3,), spread)
    made = jax.jit(cayley)(matrix)
    np.testing.assert_allclose(made, exact(matrix), atol=3e-5 * max(1.0, np.sqrt(size) * min(spread, 3.0)))
    np.testing.assert_allclose(made @ jnp.swapaxes(made, -1, -2), np.broadcast_to(np.eye(size), made.shape), atol=1e-4)


def test_both_modes_of_differentiation_agree_with_differences():
    matrix, change = random_skew(5), random_skew(5, seed=1)
    weights = np.random.default_rng(2).normal(size=(5, 5))
    step = 1e-5
    wide, by = np.asarray(matrix, np.float64), np.asarray(change, np.float64)
    slope = ((exact(wide + step * by) - exact(wide - step * by)) * weights).sum() / (2 * step)

    def value(t):
        return jnp.sum(cayley(matrix + t * change) * weights)

    np.testing.assert_allclose(jax.grad(value)(0.0), slope, rtol=1e-3)
    np.testing.assert_allclose(jax.jacfwd(value)(0.0), slope, rtol=1e-3)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(value)))(jnp.zeros(2)), [slope, slope], rtol=1e-3)
    assert np.isfinite(jax.hessian(value)(0.0))


def test_a_step_on_cpu_calls_no_decomposition():
    """Many of them in one program can wait for each other for ever."""
    step = jax.jit(jax.grad(lambda q: jnp.sum(cayley(q) ** 3)))
    assert "custom-call" not in step.lower(random_skew(8, (4,))).compile().as_text()


def test_the_series_is_the_transform_up_to_its_last_power():
    matrix = random_skew(6, spread=0.2)
    wide = np.asarray(matrix, np.float64)
    for terms in (2, 3, 6):
        expected = exact(matrix) @ (np.eye(6) - np.linalg.matrix_power(wide, terms - 1))
        np.testing.assert_allclose(cayley_neumann(matrix, terms), expected, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        cayley_neumann(matrix, 1)
