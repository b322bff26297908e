"""A weight split by singular values: what it computes, what learns, what it costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.methods.low_rank.svfit import SplitSVD
from tests.tolerances import tolerance


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def split(w, k, **options):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": sj.osf(k, **options)}, key=jax.random.key(0))


def loss(p, x):
    return jnp.sum(jnp.sin(x @ p["w"]))


@pytest.mark.parametrize("route", ["factored", "materialized", "auto"])
@pytest.mark.parametrize("width", ["exact", "common"])
def test_gradients_are_those_of_the_formula(route, width):
    w, x, k = matrix((12, 8)), matrix((5, 12), 1), 3
    trainable, frozen = sj.partition(split(w, k, route=route, width=width))
    found = jax.jit(jax.grad(lambda t: sj.with_adapters(loss)(sj.combine(t, frozen), jnp.asarray(x))))(trainable)["w"]
    full = x.T @ np.cos(x @ w)
    left, values, right = (np.asarray(v) for v in (trainable["w"].left, trainable["w"].core, trainable["w"].right))
    np.testing.assert_allclose(found.left, full @ right.T * values, atol=1e-4)
    np.testing.assert_allclose(found.right, values[:, None] * (left.T @ full), atol=1e-4)
    live = slice(-5, None)  # of the common width the frozen triples have values of zero, and learn nothing
    np.testing.assert_allclose(found.core[live], np.einsum("ij,ik,kj->j", left, full, right.T)[live], atol=1e-4)
    assert np.abs(np.asarray(found.core)[:-5]).sum() == 0


def test_masked_columns_count_for_nothing_whatever_they_hold():
    adapted = split(matrix((12, 8)), 5, width="common")["w"]
    disturbed = dataclasses.replace(
        adapted, left=adapted.left.at[:, :5].set(7.0), core=adapted.core.at[:5].set(7.0), right=adapted.right + 0.0
    )
    disturbed = dataclasses.replace(disturbed, right=disturbed.right.at[:5].set(7.0))
    np.testing.assert_array_equal(disturbed.materialize(), adapted.materialize())


def test_signs_of_matched_vectors_do_not_matter():
    weight = split(matrix((12, 8)), 3)["w"]
    flip = jnp.asarray([1.0, -1, 1, -1, -1])
    flipped = dataclasses.replace(weight, left=weight.left * flip, right=weight.right * flip[:, None])
    np.testing.assert_allclose(flipped.materialize(), weight.materialize(), atol=tolerance(size=4))


def test_a_wholly_frozen_weight_has_nothing_to_train():
    adapted = split(matrix((12, 8)), 8)
    assert isinstance(adapted["w"], SplitSVD)
    assert sj.summary(adapted).trainable == 0
    x = jnp.asarray(matrix((3, 12), 2))
    np.testing.assert_allclose(sj.with_adapters(lambda p, x: x @ p["w"])(adapted, x), x @ matrix((12, 8)), atol=1e-4)


def flops(weight, rows):
    def step(trainable, frozen, x):
        return jax.grad(lambda t: jnp.sum(sj.with_adapters(loss)(sj.combine(t, frozen), x)))(trainable)

    x = jax.ShapeDtypeStruct((rows, weight["w"].shape[0]), jnp.float32)
    return jax.jit(step).lower(*sj.partition(weight), x).compile().cost_analysis()["flops"]


@pytest.mark.optimized
@pytest.mark.parametrize(("k", "rows"), [(4, 16), (4, 2048), (60, 16), (60, 2048)])
def test_the_automatic_route_is_the_cheaper_one(k, rows):
    cost = {
        route: flops(split(matrix((64, 64)), k, route=route), rows) for route in ("factored", "materialized", "auto")
    }
    assert cost["auto"] == min(cost["factored"], cost["materialized"])
