"""The regularizer against singular values and finite differences, its gate, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ortho_group

import subspace_jax as sj
from subspace_jax.core import Role, RoleError, StructureError
from subspace_jax.methods.regularized.lambda_orthogonality import (
    lambda_orthogonality,
    lambda_orthogonality_gradient,
    soft_orthogonality,
)
from tests.tolerances import tolerance

SHAPES = {"square": (7, 7), "tall": (9, 4), "wide": (4, 9), "stacked": (3, 5, 4)}


def kernel(shape=(7, 7), seed=0, scale=0.6):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def distance(w):
    """From the singular values, in float64."""
    return np.sqrt(np.sum((np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2 - 1) ** 2, axis=-1))


def value(w, lam, alpha):
    x = distance(w)
    return np.sum(x / (1 + np.exp(-alpha * (x - lam))))


@pytest.mark.parametrize("name", SHAPES)
def test_distance_is_that_of_the_singular_values(name):
    w = kernel(SHAPES[name])
    found = soft_orthogonality(w)
    assert found.shape == w.shape[:-2]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, distance(w), rtol=1e-5)
    if name == "square":
        direct = [np.linalg.norm(a.T @ a - np.eye(7)) for a in (w.astype(np.float64), w.T.astype(np.float64))]
        np.testing.assert_allclose(found, direct, rtol=1e-5)


def test_the_smaller_gram_matrix_lets_kernels_that_are_not_square_reach_zero():
    frame = ortho_group.rvs(9, random_state=0)[:, :4].astype(np.float32)
    for w in (frame, frame.T):
        assert soft_orthogonality(w) < 1e-5


slope = jax.jit(jax.grad(lambda_orthogonality))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("lam", "alpha"), [(2.0, 1.0), (0.0, 3.0), (5.0, 0.5)])
def test_value_and_gradients_in_float64(name, lam, alpha):
    w = kernel(SHAPES[name])
    np.testing.assert_allclose(lambda_orthogonality(w, lam, alpha), value(w, lam, alpha), rtol=1e-5)
    wide = w.astype(np.float64)
    numeric = np.zeros_like(wide)
    for i in np.ndindex(*w.shape):
        step = np.zeros_like(wide)
        step[i] = 1e-6
        numeric[i] = (value(wide + step, lam, alpha) - value(wide - step, lam, alpha)) / 2e-6
    for found in (lambda_orthogonality_gradient(w, lam, alpha), slope(w, lam, alpha)):
        np.testing.assert_allclose(found, numeric, atol=2e-4 * np.abs(numeric).max())


def test_rotations_of_inputs_and_outputs_change_nothing():
    w = kernel((9, 4))
    left, right = ortho_group.rvs(9, random_state=1), ortho_group.rvs(4, random_state=2)
    turned = (left @ w @ right).astype(np.float32)
    np.testing.assert_allclose(lambda_orthogonality(turned, 1.0), lambda_orthogonality(w, 1.0), rtol=1e-5)


def at_distance(x):
    """A 1 x 1 kernel at this distance."""
    return jnp.sqrt(1 + jnp.asarray(x, jnp.float32))[..., None, None]


def test_gate_is_half_open_at_lambda_and_the_loss_grows_with_the_distance():
    np.testing.assert_allclose(lambda_orthogonality(at_distance(6.0), 6.0), 3.0, rtol=1e-5)
    distances = np.linspace(0.0, 30.0, 200)
    for lam, alpha in ((12.0, 1.0), (3.0, 0.3), (0.0, 5.0)):
        losses = np.asarray(
            jax.vmap(lambda w, lam=lam, a=alpha: lambda_orthogonality(w, lam, a))(at_distance(distances))
        )
        assert (np.diff(losses) > 0).all()
    np.testing.assert_allclose(losses[-1], 30.0, rtol=1e-5)
    np.testing.assert_allclose(lambda_orthogonality(at_distance(500.0), 12.0), 500.0, rtol=1e-5)


def test_slope_over_the_distance():
    """At x = w² - 1 the gradient over w is 2 w (s + alpha x s (1 - s))."""
    for x, lam, alpha in ((3.0, 3.0, 1.0), (5.0, 4.0, 0.7), (1.0, 6.0, 0.5)):
        s = 1 / (1 + np.exp(-alpha * (x - lam)))
        expected = 2 * np.sqrt(1 + x) * (s + alpha * x * s * (1 - s))
        np.testing.assert_allclose(lambda_orthogonality_gradient(at_distance(x), lam, alpha), [[expected]], rtol=1e-5)


def test_limits_of_lambda_and_alpha():
    w = kernel()
    x = soft_orthogonality(w)
    assert 1.0 < x < 20.0
    np.testing.assert_allclose(lambda_orthogonality(w, -np.inf), x, rtol=tolerance())
    np.testing.assert_allclose(lambda_orthogonality(w, 0.0, 1e3), x, rtol=tolerance())
    np.testing.assert_allclose(lambda_orthogonality(w, x - 0.5, 1e3), x, rtol=tolerance())
    np.testing.assert_allclose(lambda_orthogonality(w, x + 0.5, 1e3), 0.0, atol=tolerance(size=4))
    for lam in (np.inf, jnp.inf * jnp.ones(())):
        assert lambda_orthogonality(w, lam) == 0.0
        for found in (
            lambda_orthogonality_gradient(w, lam),
            slope(jnp.asarray(w), lam),
        ):
            np.testing.assert_array_equal(found, np.zeros_like(w))


def test_default_is_the_published_one_at_its_size():
    w = jnp.zeros((1024, 1200)).at[0, 0].set(1.0)
    x = np.sqrt(1023.0)
    np.testing.assert_allclose(lambda_orthogonality(w), x / (1 + np.exp(12.0 - x)), rtol=1e-5)


@pytest.mark.parametrize("w", [np.eye(5), -np.eye(6)[:, :4], np.eye(4, 6), np.zeros((4, 4)), np.zeros((3, 2))])
def test_gradients_are_finite_at_orthogonal_and_zero_kernels(w):
    w = jnp.asarray(w, jnp.float32)
    for found in (lambda_orthogonality_gradient(w, 0.0), slope(w, 0.0)):
        np.testing.assert_array_equal(found, np.zeros_like(w))
    np.testing.assert_allclose(soft_orthogonality(w), distance(w), rtol=tolerance())


def test_rotations_have_a_value_near_zero_and_a_bounded_gradient():
    turn = jnp.asarray(ortho_group.rvs(30, random_state=3), jnp.float32)
    assert lambda_orthogonality(turn, 0.0) < 1e-5
    assert np.linalg.norm(lambda_orthogonality_gradient(turn, 0.0)) <= 2.0


def test_descent_lowers_the_distance_and_smaller_lambdas_bring_angles_to_90_degrees():
    start = jnp.asarray(kernel((24, 24), scale=0.4))

    def descend(lam):
        def step(w, _):
            return w - 0.01 * lambda_orthogonality_gradient(w, lam), soft_orthogonality(w)

        return jax.lax.scan(step, start, None, length=400)

    spreads = []
    for lam in (0.0, 3.0, 6.0):
        w, distances = jax.jit(descend)(lam)
        assert np.diff(distances).max() < 0
        unit = np.asarray(w) / np.linalg.norm(w, axis=0)
        angles = np.degrees(np.arccos(np.clip(unit.T @ unit, -1, 1)))[~np.eye(24, dtype=bool)]
        spreads.append(np.abs(angles - 90).mean())
    assert 1.5 * spreads[0] < spreads[1] < spreads[2] / 1.5


def test_stand_in_weights_and_roles():
    params = {"w": jnp.asarray(kernel((6, 2, 4))), "v": jnp.asarray(kernel((6, 5)), jnp.bfloat16)}
    roles = {"w": Role.dense(in_axes=(0,), out_axes=(1, 2))}
    adapted = sj.adapt(params, {"**": sj.pissa(2)}, key=jax.random.key(0), roles=roles)
    expected = value(params["w"].reshape(6, 8), 1.0, 1.0)
    np.testing.assert_allclose(lambda_orthogonality(params["w"], 1.0, role=roles["w"]), expected, rtol=1e-5)
    np.testing.assert_allclose(lambda_orthogonality(adapted["w"], 1.0), expected, rtol=1e-5)
    found = lambda_orthogonality(adapted["v"], 1.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, value(params["v"].astype(jnp.float32), 1.0, 1.0), rtol=1e-2)
    gradient = jax.jit(jax.grad(lambda w: lambda_orthogonality(w, 1.0)))(adapted["w"])
    assert np.abs(gradient.a).max() > 0
    assert not np.asarray(gradient.base).any()


def test_narrow_kernels_are_reckoned_in_float32():
    w = jnp.asarray(kernel(), jnp.bfloat16)
    found = lambda_orthogonality(w, 1.0)
    assert found.dtype == lambda_orthogonality_gradient(w, 1.0).dtype == jnp.float32
    np.testing.assert_allclose(found, value(w.astype(jnp.float32), 1.0, 1.0), rtol=1e-5)


def test_lambda_and_alpha_are_data():
    traces = []

    @jax.jit
    def run(w, lam, alpha):
        traces.append(None)
        return lambda_orthogonality(w, lam, alpha)

    for lam in (1.0, 2.0, np.inf):
        np.testing.assert_allclose(
            run(kernel(), lam, 1.0), value(kernel(), lam, 1.0), rtol=1e-5, atol=tolerance(size=4)
        )
    assert len(traces) == 1


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf])
def test_bad_steepness_is_refused(alpha):
    for function in (lambda_orthogonality, lambda_orthogonality_gradient):
        with pytest.raises(ValueError, match="positive finite"):
            function(kernel(), 1.0, alpha)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(StructureError, match=r"Shape \(3,\)"):
        lambda_orthogonality(jnp.ones(3))
    with pytest.raises(RoleError, match="bias"):
        lambda_orthogonality(jnp.ones(3), role=Role("bias", out_axes=(0,)))
