"""CorDA against numpy: the singular vectors of the covariance times the weight."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import RankError, Statistics, StatisticsError
from tests.tolerances import tolerance

SHAPES = [(12, 7), (7, 12), (8, 8)]
MODES = ["instruction_previewed", "knowledge_preserved"]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram(size, seed=5):
    """An anisotropic one, far from the identity."""
    rows = matrix((40, size), seed) * np.geomspace(1, 0.1, size, dtype=np.float32)
    return rows.T @ rows


def adapt(w, method, covariance, **kwargs):
    stats = {"w": Statistics(gram=jnp.asarray(covariance))}
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0), stats=stats, **kwargs)


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"])


def numpy_corda(w, covariance, rank, mode, scale=1.0, damping=0.01):
    """Steps 3 to 7 in float64; also the chosen right vectors and all values."""
    w, c = w.astype(np.float64), covariance.astype(np.float64)
    c = c + damping * np.mean(np.diag(c)) * np.eye(len(c))
    p, s, qt = np.linalg.svd(c @ w, full_matrices=False)
    chosen = slice(rank) if mode in ("instruction_previewed", "ipm") else slice(len(s) - rank, None)
    root = np.sqrt(s[chosen] / scale)
    a = scipy.linalg.cho_solve(scipy.linalg.cho_factor(c), p[:, chosen] * root)
    return a, root[:, None] * qt[chosen], qt[chosen].T, s, c


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factors", ["projection", "solve"])
def test_factors_and_residual_are_those_of_numpy(shape, mode, factors):
    w, c = matrix(shape), gram(shape[0])
    weight = adapt(w, sj.corda(3, mode=mode, alpha=6.0, factors=factors), c)["w"]
    a, b, q, *_ = numpy_corda(w, c, 3, mode, scale=2.0)
    signs = np.sign(np.sum(np.asarray(weight.b) * b, axis=1))
    np.testing.assert_allclose(weight.a * signs, a, rtol=2e-3, atol=2e-3 * np.abs(a).max())
    np.testing.assert_allclose(weight.b * signs[:, None], b, rtol=2e-3, atol=2e-3 * np.abs(b).max())
    assert weight.scale == 2.0
    # The closed form, without any inverse.
    np.testing.assert_allclose(2.0 * weight.a @ weight.b, w @ q @ q.T, atol=1e-4)
    np.testing.assert_allclose(weight.base, w - w @ q @ q.T, atol=1e-4)
    assert np.abs(weight.base @ weight.b.T).max() <= 1e-4 * np.abs(w).max() * np.abs(b).max()
    assert [v.dtype for v in (weight.a, weight.b)] == [jnp.float32, jnp.float32]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("spread", [0.0, 3.0, 8.0])
def test_starts_at_the_weight_for_any_covariance(mode, rank, spread):
    w = matrix((12, 7))
    q = np.linalg.qr(matrix((12, 12), 1))[0]
    c = (q * np.logspace(0, -spread, 12)) @ q.T
    for factors in ("projection", "solve"):
        merged = dense(adapt(w, sj.corda(rank, mode=mode, factors=factors), c.astype(np.float32)))
        assert np.abs(merged - w).max() <= 1e-5 * np.abs(w).max()


def test_short_names_of_the_modes():
    w, c = matrix((12, 7)), gram(12)
    for long, short in zip(MODES, ("ipm", "kpm"), strict=True):
        one, other = (adapt(w, sj.corda(3, mode=m), c)["w"] for m in (long, short))
        np.testing.assert_array_equal(one.a, other.a)


@pytest.mark.parametrize("shape", SHAPES)
def test_modes_are_complements(shape):
    w, c = matrix(shape), gram(shape[0])
    first = adapt(w, sj.corda(min(shape) - 3, mode="ipm"), c)["w"]
    last = adapt(w, sj.corda(3, mode="kpm"), c)["w"]
    np.testing.assert_allclose(last.base, first.a @ first.b, atol=2e-5)
    np.testing.assert_allclose(first.base, last.a @ last.b, atol=2e-5)


def test_inputs_alike_in_all_directions_give_singular_components():
    w = matrix((12, 7))
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    for mode, chosen in (("ipm", slice(3)), ("kpm", slice(4, None))):
        weight = adapt(w, sj.corda(3, mode=mode), 5.0 * np.eye(12, dtype=np.float32))["w"]
        np.testing.assert_allclose(weight.a @ weight.b, (u[:, chosen] * s[chosen]) @ vt[chosen], atol=1e-4)
    first = adapt(w, sj.corda(3), np.eye(12, dtype=np.float32))["w"]
    pissa = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.pissa(3, svd="exact")}, key=jax.random.key(0))["w"]
    np.testing.assert_allclose(first.base, pissa.base, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_the_covariance_moves_only_the_balance(mode):
    w, c = matrix((12, 7)), gram(12)
    one, other = (adapt(w, sj.corda(3, mode=mode), f * c)["w"] for f in (1.0, 100.0))
    np.testing.assert_allclose(other.base, one.base, atol=2e-5)
    np.testing.assert_allclose(other.a, one.a / 10, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(other.b, one.b * 10, rtol=1e-3, atol=1e-4)


def test_gram_is_divided_by_the_number_of_examples():
    w, c = matrix((12, 7)), gram(12)
    params = {"w": jnp.asarray(w)}
    stats = {"w": Statistics(gram=jnp.asarray(c), examples=jnp.asarray(4.0), count=jnp.asarray(40.0))}
    weight = sj.adapt(params, {"w": sj.corda(3)}, key=jax.random.key(0), stats=stats)["w"]
    expected = adapt(w, sj.corda(3), c / 4)["w"]
    np.testing.assert_allclose(weight.a, expected.a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_balanced_factors_have_equal_norms_and_the_same_product(mode):
    w, c = matrix((12, 7)), gram(12)
    plain, balanced = (adapt(w, sj.corda(3, mode=mode, balanced=b), c)["w"] for b in (False, True))
    np.testing.assert_allclose(balanced.a @ balanced.b, plain.a @ plain.b, atol=1e-5)
    left, right = np.linalg.norm(balanced.a, axis=0), np.linalg.norm(balanced.b, axis=1)
    np.testing.assert_allclose(left, right, rtol=1e-5)
    assert (np.abs(np.linalg.norm(plain.a, axis=0) / np.linalg.norm(plain.b, axis=1) - 1) > 0.1).all()


def test_first_components_are_the_best_for_the_data():
    """Against a descent over all 3x3 matrices of rank 1, from many starts."""
    w, c = matrix((3, 3)), gram(3)
    *_, s, damped = numpy_corda(w, c, 1, "ipm")
    weight = adapt(w, sj.corda(1), c)["w"]
    error = np.linalg.norm(damped @ (w - np.asarray(weight.a @ weight.b, np.float64)))
    np.testing.assert_allclose(error, np.sqrt(np.sum(s[1:] ** 2)), rtol=1e-4)
    angles = np.linspace(0, np.pi, 61)
    directions = np.array([[np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)] for t in angles for p in angles])
    # The best left factor for a unit right factor v is W v.
    others = [np.linalg.norm(damped @ (w - np.outer(w @ v, v))) for v in directions]
    assert error <= min(others) + 1e-6
    assert min(others) <= 1.02 * error


def test_randomized_decomposition_finds_the_same_components():
    w, c = matrix((40, 30)), gram(40)
    exact, found = (adapt(w, sj.corda(4, svd=svd, iterations=8), c)["w"] for svd in ("exact", "randomized"))
    np.testing.assert_allclose(found.base, exact.base, atol=1e-3)
    np.testing.assert_allclose(found.materialize(), w, atol=1e-5)


class TestDampedCovariance:
    def test_sound_covariance_gets_the_first_damping(self):
        c = gram(12)
        found = sj.methods.corda.damped_covariance(jnp.asarray(c))
        np.testing.assert_allclose(found.damping, 0.01)
        np.testing.assert_allclose(
            found.covariance, c + 0.01 * np.mean(np.diag(c)) * np.eye(12), rtol=1e-5, atol=tolerance(size=4)
        )
        np.testing.assert_allclose(found.factor @ found.factor.T, found.covariance, rtol=1e-4, atol=1e-4)
        product = found.covariance @ np.linalg.inv(found.covariance)
        assert np.linalg.norm(product - np.eye(12)) < 1e-4
        assert found.error < 1e-4

    def test_damping_doubles_for_every_matrix_of_a_stack_by_itself(self):
        # A negative eigenvalue stands for what rounding does: Cholesky fails until the damping is above it.
        needed = [0.0, 0.03, 1.0, 300.0]
        stack = []
        for i, d in enumerate(needed):
            q = np.linalg.qr(matrix((6, 6), i))[0]
            values = np.array([-d, 1.0, 1.0, 1.0, 1.0, 2.0 + d])
            stack.append((q * values) @ q.T)
        c = np.stack(stack).astype(np.float32)
        found = sj.methods.corda.damped_covariance(jnp.asarray(c))
        for i, d in enumerate(needed):
            expected = 0.01
            while expected * np.mean(np.diag(c[i])) <= d:
                expected *= 2
            np.testing.assert_allclose(found.damping[i], expected, rtol=1e-5)

    def test_threshold_is_that_of_the_inverse(self):
        q = np.linalg.qr(matrix((60, 60)))[0]
        c = ((q * np.logspace(0, -9, 60)) @ q.T).astype(np.float32)
        for threshold in (1e-5, 3e-5):
            found = sj.methods.corda.damped_covariance(jnp.asarray(c), threshold=threshold, damping=1e-5)
            assert found.error < threshold
            assert found.damping > 1e-5
            before = sj.methods.corda.damped_covariance(jnp.asarray(c), threshold=1.0, damping=float(found.damping) / 2)
            assert before.error >= threshold

    def test_the_default_start_and_factor_are_the_published_ones(self):
        q = np.linalg.qr(matrix((6, 6)))[0]
        c = ((q * np.array([3.0, 1.0, 1.0, 1.0, 1.0, -0.5])) @ q.T).astype(np.float32)
        found = float(sj.methods.corda.damped_covariance(jnp.asarray(c)).damping)
        assert np.log2(found / 0.01) == pytest.approx(round(np.log2(found / 0.01)), abs=1e-4)

    def test_hopeless_covariance_is_refused(self):
        for bad in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
            with pytest.raises(StatisticsError, match=r"not invertible after 30 doublings of the damping 0\.01"):
                sj.methods.corda.damped_covariance(jnp.asarray(bad, jnp.float32))
        with pytest.raises(StatisticsError, match="after 3 doublings"):
            sj.methods.corda.damped_covariance(jnp.full((4, 4), 1.0), threshold=1e-12, doublings=3)

    def test_inside_jit(self):
        found = jax.jit(sj.methods.corda.damped_covariance)(jnp.asarray(gram(6)))
        np.testing.assert_allclose(found.damping, 0.01)


def test_gradients_are_those_of_the_factors_and_the_rest_is_frozen():
    w, x = matrix((12, 7)), matrix((5, 12), 1)
    adapted = adapt(w, sj.corda(3, alpha=6.0), gram(12))
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    found = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen), x)))(trainable)["w"]
    full = x.T @ np.cos(x @ w)
    weight = adapted["w"]
    np.testing.assert_allclose(found.a, 2.0 * full @ weight.b.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.b, 2.0 * weight.a.T @ full, rtol=1e-3, atol=1e-3)
    assert sj.summary(adapted).trainable == 3 * (12 + 7)
    everywhere = jax.jit(jax.grad(apply))(adapted, x)["w"]
    assert not np.asarray(everywhere.base).any()


def test_trained_adapter_is_a_lora_of_twice_the_rank():
    w = matrix((12, 7))
    params = {"w": jnp.asarray(w)}
    adapted = adapt(w, sj.corda(3, mode="kpm", alpha=6.0), gram(12))
    trainable, frozen = sj.partition(adapted)
    moved = sj.combine(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    lora = sj.to_lora(moved, params)
    np.testing.assert_array_equal(lora["w"].base, w)
    assert lora["w"].rank == 6
    np.testing.assert_allclose(dense(lora), dense(moved), atol=1e-4)


def test_every_layer_of_a_stack_by_itself():
    w, c = matrix((3, 9, 6)), np.stack([gram(9, s) for s in range(3)])
    weight = adapt(w, sj.corda(2), c, roles={"w": sj.Role.dense((1,), (2,), (0,))})["w"]
    for i in range(3):
        one = adapt(w[i], sj.corda(2), c[i])["w"]
        np.testing.assert_allclose(weight.base[i], one.base, atol=1e-5)
        np.testing.assert_allclose(weight.a[i], one.a, rtol=1e-3, atol=1e-4)


def test_convolution_from_its_captured_patches():
    kernel, images = matrix((3, 3, 2, 5)), matrix((4, 6, 6, 2), 1)
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params = {"w": jnp.asarray(kernel)}
    stats = sj.capture(fn, params, [images], scale_examples="max_abs")
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    rows = (windows.reshape(4, -1) / np.abs(windows).reshape(4, -1).max(axis=1, keepdims=True)).reshape(-1, 18)
    rules = {"w": sj.corda(2, mode="kpm")}
    weight = sj.adapt(params, rules, key=jax.random.key(0), stats=stats, roles=sj.roles(fn, params, images))["w"]
    a, b, *_ = numpy_corda(kernel.reshape(18, 5), rows.T @ rows / 4, 2, "kpm")
    np.testing.assert_allclose(weight.a @ weight.b, a @ b, atol=1e-4)
    np.testing.assert_allclose(np.abs(weight.a), np.abs(a), rtol=1e-2, atol=1e-3)


def test_components_of_size_zero_warn_and_harm_nothing():
    w, c = matrix((12, 3)) @ matrix((3, 7), 1), gram(12)
    with pytest.warns(UserWarning, match=r"weight of shape \(12, 7\) all trained components are below 1e-06"):
        weight = adapt(w, sj.corda(2, mode="kpm"), c)["w"]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(weight))
    np.testing.assert_allclose(weight.materialize(), w, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(w, sj.corda(2, mode="ipm"), c)
        adapt(w, sj.corda(5, mode="kpm"), c)


def test_weight_of_zeros_stays_finite():
    weight = adapt(np.zeros((5, 4), np.float32), sj.corda(2), gram(5))["w"]
    assert all(not np.asarray(v).any() for v in (weight.base, weight.a, weight.b))


def test_bfloat16_weight_is_decomposed_in_float32():
    w = jnp.asarray(matrix((12, 7)), jnp.bfloat16)
    weight = adapt(w, sj.corda(3), gram(12))["w"]
    assert weight.base.dtype == jnp.bfloat16
    assert weight.a.dtype == jnp.float32
    wide = adapt(w, sj.corda(3, residual_dtype=jnp.float32, dtype=jnp.bfloat16), gram(12))["w"]
    assert (wide.base.dtype, wide.a.dtype) == (jnp.float32, jnp.bfloat16)
    # The residual makes up for the rounding of the stored factors.
    np.testing.assert_array_equal(wide.materialize(), w)


def test_bad_options_are_refused_by_name():
    w = matrix((8, 6))
    with pytest.raises(RankError, match=r"w: corda: rank=9 is above the weight's smaller side 6"):
        adapt(w, sj.corda(9), gram(8))
    with pytest.raises(StatisticsError, match=r"w: corda: .*has shape \(6, 6\), expected \(8, 8\)"):
        adapt(w, sj.corda(2), gram(6))
    with pytest.raises(StatisticsError, match=r"w: corda: the covariance of shape \(8, 8\) is not invertible"):
        adapt(w, sj.corda(2), np.zeros((8, 8), np.float32))
    with pytest.raises(StatisticsError, match=r"w: corda needs gram, which were not captured"):
        sj.adapt({"w": jnp.asarray(w)}, {"w": sj.corda(2)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="corda: mode='first'"):
        sj.corda(2, mode="first")
    with pytest.raises(ValueError, match="svd='fast'"):
        sj.corda(2, svd="fast")
    with pytest.raises(ValueError, match="knowledge is kept by the last"):
        sj.corda(2, mode="kpm", svd="randomized")
