import jax.numpy as jnp
import numpy as np

from subspace_jax.models import apply_rotary, rotary_tables


def rotate(x, position, base=10000.0):
    sin, cos = rotary_tables(jnp.array([[position]]), x.shape[-1], base)
    return np.asarray(apply_rotary(jnp.asarray(x, jnp.float32)[None, None, None], sin, cos))[0, 0, 0]


def test_the_rotation_is_a_complex_product(rng):
    x = rng.normal(size=8)
    z = (x[:4] + 1j * x[4:]) * np.exp(1j * 11 * 500.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(rotate(x, 11, base=500.0), np.concatenate([z.real, z.imag]), atol=1e-5)


def test_the_product_depends_on_the_distance_alone(rng):
    query, key = rng.normal(size=(2, 16))
    products = [rotate(query, 9 + shift) @ rotate(key, 4 + shift) for shift in (0, 1, 30)]
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(rotate(query, 9) @ rotate(key, 5) - products[0]) > 1e-3


def test_half_precision_is_rotated_in_single(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    sin, cos = rotary_tables(jnp.array([[8000, 8001, 8002]]), 8, 10000.0)
    found = apply_rotary(x, sin, cos)
    assert found.dtype == jnp.bfloat16
    expected = apply_rotary(x.astype(jnp.float32), sin, cos).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
