"""Order statistics of magnitudes beside numpy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from subspace_jax.linalg import kth_smallest_magnitude, magnitude_quantile

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS | st.sampled_from([0.0, -0.0, 1.0, -1.0])), st.integers(1, 12))
def test_every_order_is_numpys(matrix, order):
    expected = np.sort(np.abs(matrix), axis=None)[order - 1]
    assert float(jax.jit(kth_smallest_magnitude)(matrix, order)) == expected


def test_order_zero_is_zero_and_a_stack_takes_an_order_each():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    found = kth_smallest_magnitude(stack, jnp.array([0, 7]))
    assert found.tolist() == [0.0, float(np.sort(np.abs(stack[1]), axis=None)[6])]
    assert kth_smallest_magnitude(stack, 15).tolist() == [float(jnp.abs(one).max()) for one in stack]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=16, allow_subnormal=False)), st.floats(0, 1))
def test_quantiles_are_numpys(matrix, quantile):
    expected = np.quantile(np.abs(matrix).astype(np.float64), quantile)
    np.testing.assert_allclose(magnitude_quantile(matrix, quantile), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(magnitude_quantile)(matrix, quantile), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacks_ties_and_the_ends(dtype):
    stack = jnp.asarray([[[1.0, -1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype)
    for quantile in (0, 0.5, 2 / 3, 0.9, 1):
        found = magnitude_quantile(stack, quantile)
        np.testing.assert_allclose(
            found, np.quantile(np.abs(stack).astype(np.float64), quantile, axis=(1, 2)), rtol=1e-6
        )
        assert found.dtype == jnp.float32
