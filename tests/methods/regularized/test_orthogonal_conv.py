"""Orthogonal convolutions against the layer's own matrix on small images, loops of sums, and the table of existence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax import lax

from subspace_jax.core import PatternError, RankError, RoleError
from subspace_jax.methods.regularized.orthogonal_conv import (
    add_orthogonality,
    can_be_orthogonal,
    conv_singular_values,
    orthogonal_kernel,
    orthogonality,
    self_convolution,
    singular_value_bounds,
)

KEY = jax.random.key(0)
distance = jax.jit(orthogonality, static_argnums=1)
spectrum = jax.jit(conv_singular_values, static_argnums=(1, 2))
bounds = jax.jit(singular_value_bounds, static_argnums=1)
isometry = jax.jit(orthogonal_kernel, static_argnums=(1, 2), static_argnames="dtype")
# Outputs, inputs, window, stride, output size.
SHAPES = [(3, 4, 3, 1, 5), (6, 4, 3, 1, 6), (5, 2, 3, 2, 4), (10, 2, 3, 2, 5), (4, 2, 2, 2, 4), (8, 1, 3, 2, 4)]


def kernel_of(m, c, k, scale=0.4, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(k, k, c, m))


def operator(kernel, stride, n):
    """The matrix of the layer with circular padding on one-hot images."""
    k, c = kernel.shape[0], kernel.shape[2]
    size = stride * n
    images = np.eye(c * size * size, dtype=np.float32).reshape(-1, size, size, c)
    padded = np.pad(images, ((0, 0), (0, k - 1), (0, k - 1), (0, 0)), mode="wrap")
    y = lax.conv_general_dilated(
        padded,
        kernel.astype(np.float32),
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return np.asarray(y, np.float64).reshape(len(images), -1).T


@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_meets_itself_as_in_a_loop(stride):
    kernel = kernel_of(3, 2, 3)
    found = np.asarray(self_convolution(jnp.asarray(kernel, jnp.float32), stride))
    q = 2 // stride
    assert found.shape == (3, 2 * q + 1, 2 * q + 1, 3)
    for i, j, u, v in itertools.product(range(3), range(3), range(2 * q + 1), range(2 * q + 1)):
        total = 0.0
        for a, b in itertools.product(range(3), repeat=2):
            s, t = a + stride * (u - q), b + stride * (v - q)
            if 0 <= s < 3 and 0 <= t < 3:
                total += kernel[s, t, :, i] @ kernel[a, b, :, j]
        np.testing.assert_allclose(found[i, u, v, j], total, atol=1e-5)
    np.testing.assert_allclose(found, np.flip(found, (1, 2)).transpose(3, 1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_distance_of_the_layer_from_an_isometry_and_bounds_its_spectrum(shape):
    m, c, k, s, n = shape
    kernel = kernel_of(m, c, k)
    t = operator(kernel, s, n)
    loss = float(distance(kernel.astype(np.float32), s))
    rows = m <= c * s * s
    gram = t @ t.T if rows else t.T @ t
    off = gram - np.eye(len(gram))
    np.testing.assert_allclose(np.sum(off**2), n * n * loss, rtol=1e-4)
    values = np.linalg.svd(t, compute_uv=False)
    np.testing.assert_allclose(spectrum(kernel.astype(np.float32), s * n, s), values, atol=2e-4)
    near = np.float32(0.999) * np.asarray(isometry(KEY, (k, k, c, m), s))
    low, high = map(float, bounds(near, s))
    values = np.asarray(spectrum(near, s * n, s))
    assert 0 < low <= values.min() + 1e-6
    assert values.max() - 1e-6 <= high < 1.2


def test_one_tap_is_a_matrix_and_other_numbers_of_axes_work():
    w = np.random.default_rng(0).normal(size=(4, 3))
    expected = np.sum((w.T @ w - np.eye(3)) ** 2)
    np.testing.assert_allclose(orthogonality(jnp.asarray(w[None, None], jnp.float32)), expected, rtol=1e-5)
    np.testing.assert_allclose(orthogonality(jnp.asarray(w[None], jnp.float32)), expected, rtol=1e-5)
    wide = np.random.default_rng(1).normal(size=(3, 5))
    expected = np.sum((wide @ wide.T - np.eye(3)) ** 2)
    np.testing.assert_allclose(orthogonality(jnp.asarray(wide[None, None], jnp.float32)), expected, rtol=1e-4)
    line = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 3)), jnp.float32)
    flat = line[:, None]  # a window of 3 x 1
    np.testing.assert_allclose(orthogonality(flat, (2, 1)), orthogonality(line, 2), rtol=1e-5)
    groups = jnp.asarray(kernel_of(6, 2, 3), jnp.float32)
    parts = [orthogonality(groups[..., i : i + 3]) for i in (0, 3)]
    np.testing.assert_allclose(orthogonality(groups, groups=2), sum(parts), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        (3, 3, 4, 3, 1),
        (3, 3, 2, 6, 1),
        (3, 3, 2, 8, 2),
        (3, 3, 2, 10, 2),
        (2, 3, 3, 5, 1),
        (2, 2, 1, 2, 3),
        (3, 1, 4, 2, 1),
    ],
)
def test_orthogonal_kernels_are_isometries(case):
    *window, c, m, s = case
    kernel = isometry(KEY, (*window, c, m), s)
    assert abs(float(distance(kernel, s))) < 1e-5
    values = np.asarray(spectrum(kernel, 6, s))
    np.testing.assert_allclose(values, 1.0, atol=1e-5)
    half = jax.eval_shape(lambda: orthogonal_kernel(KEY, (*window, c, m), s, dtype=jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_where_the_table_says_no_nothing_gets_near():
    for (m, c, k, s), least in {(2, 1, 1, 2): 1.0, (5, 1, 2, 3): 1.0, (10, 1, 2, 3): 5.0}.items():
        assert not can_be_orthogonal((k, k, c, m), s)
        with pytest.raises(RankError, match=r"no kernel of shape .* is orthogonal"):
            orthogonal_kernel(KEY, (k, k, c, m), s)
        function = jax.jit(jax.value_and_grad(lambda w, shape=(k, k, c, m), s=s: orthogonality(w.reshape(shape), s)))
        best = min(
            scipy.optimize.minimize(
                lambda w, f=function: tuple(np.float64(v) for v in f(jnp.asarray(w, jnp.float32))),
                kernel_of(m, c, k, seed=seed).ravel(),
                jac=True,
                method="L-BFGS-B",
            ).fun
            for seed in range(3)
        )
        np.testing.assert_allclose(best, least, atol=1e-3)
    assert all(can_be_orthogonal((k, k, c, m)) for k, c, m in itertools.product((1, 3), (1, 4), (2, 9)))
    assert can_be_orthogonal((3, 3, 1, 9), 3)
    assert not can_be_orthogonal((2, 2, 1, 10), 3)


def test_a_padding_of_one_would_miss_opposite_corners():
    """Taps at two opposite corners: shifts of two meet, of which a padding of one knows nothing."""
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0, 0, 0].set(2**-0.5).at[2, 2, 0, 0].set(2**-0.5)
    np.testing.assert_allclose(orthogonality(kernel), 0.5, rtol=1e-5)
    values = np.asarray(conv_singular_values(kernel, 10))
    assert values.min() < 0.45
    assert values.max() > 1.4


def test_the_root_has_a_gradient_at_zero_and_low_precision_is_computed_wide():
    kernel = orthogonal_kernel(KEY, (3, 3, 4, 4))
    assert bool(
        jnp.isfinite(
            jax.jit(jax.grad(lambda w: orthogonality(w, power=1)))(jnp.zeros((1, 1, 2, 2)).at[0, 0].set(jnp.eye(2)))
        ).all()
    )
    half = kernel.astype(jnp.bfloat16)
    assert orthogonality(half).dtype == jnp.float32
    np.testing.assert_allclose(orthogonality(2 * kernel, power=1) ** 2, orthogonality(2 * kernel), rtol=1e-5)
    run = jax.jit(lambda kernel: orthogonality(kernel))
    run(kernel), run(2 * kernel)
    assert run._cache_size() == 1


def test_as_a_transformation_it_adds_the_gradient():
    params = {"conv": {"kernel": jnp.asarray(kernel_of(4, 3, 3), jnp.float32), "bias": jnp.ones(4)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    optimizer = add_orthogonality(0.3, {"**/kernel": 2})
    found, _ = optimizer.update(gradient, optimizer.init(params), params)
    slope = jax.jit(jax.grad(lambda k: orthogonality(k, 2)))(params["conv"]["kernel"])
    np.testing.assert_allclose(found["conv"]["kernel"], 1 + 0.3 * slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["conv"]["bias"], 1.0)
    with pytest.raises(PatternError, match="'kernels' matches no leaf; nearest are 'conv/kernel'"):
        add_orthogonality(0.1, {"kernels": 1}).init(params)
    with pytest.raises(RoleError, match=r"^conv/bias: add_orthogonality: .*expected a plain array"):
        add_orthogonality(0.1, {"**": 1}).init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(gradient, optax.EmptyState())


def test_refusals():
    with pytest.raises(RoleError, match=r"expected \[\*window, in, out\]"):
        orthogonality(jnp.ones((3, 4)))
    with pytest.raises(RoleError, match="a stride for each axis"):
        orthogonality(jnp.ones((3, 3, 2, 2)), (1, 1, 1))
    with pytest.raises(RoleError, match="not 3 groups"):
        orthogonality(jnp.ones((3, 3, 2, 4)), groups=3)
    for size in (5, 2):
        with pytest.raises(RankError, match=f"size={size}"):
            conv_singular_values(jnp.ones((3, 3, 1, 1)), size, 2)
