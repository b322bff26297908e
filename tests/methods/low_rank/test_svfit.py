"""SVFit against numpy: only the leading singular values move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError

SHAPES = [(12, 7), (7, 12), (8, 8)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, method):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0))


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"])


def moved(adapted, core):
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda _: jnp.asarray(core, jnp.float32), trainable), frozen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_starts_at_the_weight_with_its_leading_values(shape, svd):
    w = matrix(shape)
    adapted = adapt(w, sj.svfit(3, svd=svd))
    np.testing.assert_allclose(dense(adapted), w, atol=1e-5 * np.abs(w).max())
    np.testing.assert_allclose(adapted["w"].core, np.linalg.svd(w)[1][:3], rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_remains_is_orthogonal_to_what_learns(shape):
    weight = adapt(matrix(shape), sj.svfit(3))["w"]
    np.testing.assert_allclose(np.asarray(weight.base).T @ weight.left, 0, atol=1e-5)
    np.testing.assert_allclose(weight.base @ np.asarray(weight.right).T, 0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ["factored", "materialized", "auto"])
def test_gradient_is_the_diagonal_of_the_rotated_full_gradient(shape, route):
    w, x = matrix(shape), matrix((5, shape[0]), 1)
    adapted = adapt(w, sj.svfit(3, route=route))
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    found = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen), x)))(trainable)["w"].core
    full = x.T @ np.cos(x @ w)
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(found, np.diag(u[:, :3].T @ full @ vt[:3].T), rtol=2e-4, atol=2e-5)


def test_singular_values_of_the_result_are_the_trained_and_the_kept_ones():
    w = matrix((9, 6))
    values = np.linalg.svd(w)[1]
    core = np.array([0.5, -7.0, 3.3])
    changed = dense(moved(adapt(w, sj.svfit(3)), core))
    expected = np.sort(np.concatenate([np.abs(core), values[3:]]))
    np.testing.assert_allclose(np.sort(np.linalg.svd(changed)[1]), expected, rtol=1e-4)
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    inner = u[:, :3].T @ (changed - w) @ vt[:3].T
    np.testing.assert_allclose(inner, np.diag(core - values[:3]), atol=1e-5)


def test_gradient_descent_with_rate_one_reaches_the_closed_form():
    w, target = matrix((9, 6)), matrix((9, 6), 3)
    adapted = adapt(w, sj.svfit(4))
    trainable, frozen = sj.partition(adapted)
    distance = lambda t: 0.5 * jnp.sum((sj.combine(t, frozen)["w"].materialize() - target) ** 2)
    stepped = jax.tree.map(lambda p, g: p - g, trainable, jax.jit(jax.grad(distance))(trainable))
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(stepped["w"].core, np.diag(u[:, :4].T @ target @ vt[:4].T), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("measure", "power"), [("energy", 2), ("sum", 1)])
def test_automatic_rank_is_the_smallest_that_holds_the_information(measure, power):
    w = matrix((20, 12))
    mass = np.linalg.svd(w)[1] ** power
    ranks = []
    for information in (0.3, 0.6, 0.9, 0.99, 1.0):
        rank = adapt(w, sj.svfit(information=information, measure=measure))["w"].rank
        brute = next(r for r in range(1, 13) if mass[:r].sum() / mass.sum() >= information - 1e-6)
        assert rank == brute
        ranks.append(rank)
    assert ranks == sorted(ranks)


def test_stack_is_padded_to_the_largest_rank_and_padding_stays_still():
    flat = np.diag([4.0, 3.9, 3.8, 3.7])
    steep = np.diag([4.0, 0.01, 0.01, 0.01])
    w = np.stack([steep, flat]).astype(np.float32) @ matrix((4, 4))
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.svfit(information=0.9)}, key=jax.random.key(0), roles=roles)
    ranks = [
        next(r for r in range(1, 5) if (np.cumsum(s**2) / np.sum(s**2))[r - 1] >= 0.9)
        for s in np.linalg.svd(w, compute_uv=False)
    ]
    assert ranks[0] < ranks[1] == adapted["w"].rank
    np.testing.assert_allclose(dense(adapted), w, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda t, f: jnp.sum(sj.combine(t, f)["w"].materialize() ** 3)))(*sj.partition(adapted))
    np.testing.assert_array_equal(gradient["w"].core[0, ranks[0] :], 0)


def test_count_is_that_of_the_published_setting():
    params = {str(i): jax.ShapeDtypeStruct((768, 768), jnp.float32) for i in range(24)}
    adapted = jax.eval_shape(lambda p: sj.adapt(p, {"*": sj.svfit(768)}, key=jax.random.key(0)), params)
    assert sj.summary(adapted).trainable == 18_432


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match=r"w: svfit: rank=9 is above the weight's smaller side 6"):
        adapt(matrix((8, 6)), sj.svfit(9))
    with pytest.raises(ValueError, match=r"svfit: information=0.0: expected a finite number, above 0, at most 1"):
        sj.svfit(information=0.0)
    with pytest.raises(RankError, match="needs a rank"):
        sj.svfit(svd="randomized")
    with pytest.raises(RankError, match=r"w: svfit: .*pass rank="):
        jax.eval_shape(lambda p: sj.adapt(p, {"w": sj.svfit()}, key=jax.random.key(0)), {"w": jnp.ones((4, 4))})
