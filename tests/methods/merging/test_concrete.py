"""Concrete masks against their closed forms, and what training may and may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import NonFiniteError, RankError, StructureError
from subspace_jax.methods.merging.concrete import (
    ada_merging,
    add_masked,
    concrete_ada_merging,
    concrete_mask,
    concrete_task_arithmetic,
    entropy_loss,
    init_logits,
    sample_mask,
    task_vectors,
)

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BASE = {"w": normal(4, 3), "b": jnp.zeros(3), "head": normal(3, 2, seed=1)}
EXPERTS = [jax.tree.map(lambda v, i=i: v + 0.3 * normal(*v.shape, seed=5 + i), BASE) for i in range(2)]
VECTORS = task_vectors(EXPERTS, BASE, select=["w", "b"])
apply = lambda p, x, task: jnp.tanh(x @ p["w"] + p["b"]) @ p["head"] * (1 + task)
inputs = lambda key: [jax.random.normal(jax.random.fold_in(key, i), (8, 4)) for i in range(2)]


def test_vectors_are_differences_also_of_adapters():
    assert VECTORS[0]["head"] is None
    np.testing.assert_allclose(VECTORS[1]["w"], EXPERTS[1]["w"] - BASE["w"], atol=1e-6)
    adapted = sj.adapt(BASE, {"w": sj.lora(2)}, key=KEY)
    trained = sj.combine(jax.tree.map(lambda v: v + 0.2, sj.partition(adapted)[0]), sj.partition(adapted)[1])
    (one,) = task_vectors([trained], BASE, select="w")
    np.testing.assert_allclose(one["w"], sj.merge(trained)["w"] - BASE["w"], atol=1e-5)
    bad = [EXPERTS[0] | {"w": EXPERTS[0]["w"].at[0, 0].set(jnp.nan)}]
    with pytest.raises(NonFiniteError, match=r"^w: expert 0"):
        task_vectors(bad, BASE)


def test_a_mask_has_mean_one_and_its_own_key_for_every_leaf():
    logits = {"w": jnp.zeros((300, 20)), "v": jnp.zeros((300, 20)), "none": None}
    for discrete in (False, True):
        mask = sample_mask(KEY, logits, discrete=discrete)
        np.testing.assert_allclose(mask["w"].mean(), 1.0, rtol=1e-5)
        assert float(jnp.abs(mask["w"] - mask["v"]).max()) > 0.1
        np.testing.assert_array_equal(mask["w"], sample_mask(KEY, logits, discrete=discrete)["w"])
    assert len(np.unique(sample_mask(KEY, logits, discrete=True)["w"])) == 2
    whole = sample_mask(KEY, {"w": jnp.full((5, 4), 60.0)})
    np.testing.assert_allclose(whole["w"], 1.0, rtol=1e-6)
    assert bool(jnp.isfinite(sample_mask(KEY, {"w": jnp.full(3, -200.0)})["w"]).all())


@pytest.mark.parametrize("x", [-1.0, 0.0, 2.0])
def test_entries_are_above_one_half_as_often_as_their_logit_says(x):
    uniform = jax.random.uniform(KEY, (100, 200), minval=1e-30)
    share = 1 / (1 + np.exp(-x))
    deviation = 3 * np.sqrt(share * (1 - share) / uniform.size)
    for temperature in (0.1, 0.5, 1.0):
        mask = concrete_mask(jnp.full(uniform.shape, x), uniform, temperature)
        assert abs(float(jnp.mean(mask > 0.5)) - share) < deviation
        assert float(mask.min()) >= 0
        assert float(mask.max()) <= 1
    hard = concrete_mask(jnp.full(uniform.shape, x), uniform, 1e-4)
    assert float(jnp.mean((hard < 1e-3) | (hard > 1 - 1e-3))) > 0.995


def test_the_quantile_and_the_derivative_are_closed_forms():
    x, half = jnp.linspace(-2, 2, 9), jnp.full(9, 0.5)
    np.testing.assert_allclose(concrete_mask(x, half, 0.5), 1 / (1 + np.exp(-np.asarray(x) / 0.5)), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x: concrete_mask(x, half, 0.5).sum()))(x)
    m = np.asarray(concrete_mask(x, half, 0.5))
    np.testing.assert_allclose(slope, m * (1 - m) / 0.5, rtol=1e-5)
    through = jax.jit(jax.grad(lambda x: jnp.sum(sample_mask(KEY, {"w": x})["w"] * jnp.arange(9.0))))(x)
    step = 1e-2 * normal(9, seed=3)
    ends = [float(jnp.sum(sample_mask(KEY, {"w": x + s * step})["w"] * jnp.arange(9.0))) for s in (1, -1)]
    np.testing.assert_allclose(jnp.sum(through * step), (ends[0] - ends[1]) / 2, rtol=2e-2)


def test_sums_reduce_to_what_is_known():
    np.testing.assert_array_equal(add_masked(BASE, VECTORS, 0.0)["w"], BASE["w"])
    np.testing.assert_array_equal(add_masked(BASE, VECTORS, 0.5)["head"], BASE["head"])
    one = add_masked(BASE, VECTORS[:1], 1.0)
    np.testing.assert_allclose(one["w"], EXPERTS[0]["w"], atol=1e-6)
    plain = sj.merging.task_arithmetic(EXPERTS, BASE, weights=0.3, select=["w", "b"])
    whole = sample_mask(KEY, init_logits(VECTORS, 80.0))
    for coefficients in (0.3, jnp.full(2, 0.3), {"w": jnp.full(2, 0.3), "b": jnp.full(2, 0.3)}):
        np.testing.assert_allclose(add_masked(BASE, VECTORS, coefficients, whole)["w"], plain["w"], atol=1e-5)
    half = add_masked(jax.tree.map(lambda v: v.astype(jnp.bfloat16), BASE), VECTORS, 0.3)
    assert half["w"].dtype == jnp.bfloat16


def test_entropy_has_its_bounds():
    logits = 5 * normal(30, 7)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(entropy_loss(logits), np.mean(-np.sum(p * np.log(p), axis=1)), rtol=1e-5)
    np.testing.assert_allclose(entropy_loss(logits + 100), entropy_loss(logits), rtol=1e-4)
    np.testing.assert_allclose(entropy_loss(jnp.zeros((2, 7))), np.log(7), rtol=1e-6)
    masked = jnp.array([[0.0, 0.0, -jnp.inf]])
    np.testing.assert_allclose(entropy_loss(masked), np.log(2), rtol=1e-6)
    assert bool(jnp.isfinite(jax.jit(jax.grad(entropy_loss))(masked)).all())


def test_the_mask_learns_and_the_coefficient_does_not():
    found = concrete_task_arithmetic(apply, BASE, VECTORS, inputs, KEY, steps=60, learning_rate=0.1)
    assert float(found.losses[-10:].mean()) < float(found.losses[:10].mean())
    assert found.coefficients == 0.3
    assert float(jnp.abs(found.logits["w"]).max()) > 0.1
    np.testing.assert_array_equal(found.params["head"], BASE["head"])
    again = concrete_task_arithmetic(apply, BASE, VECTORS, inputs, KEY, steps=60, learning_rate=0.1)
    np.testing.assert_array_equal(found.params["w"], again.params["w"])


def test_adam_on_coefficients_is_optaxs():
    found = ada_merging(apply, BASE, VECTORS, inputs, KEY, coefficients="task", steps=3, learning_rate=0.1)
    import optax

    optimizer, lam = optax.adam(0.1), jnp.full(2, 0.3)
    state = optimizer.init(lam)

    @jax.jit
    @jax.grad
    def slope(lam, batches):
        params = BASE | {n: BASE[n] + lam[0] * VECTORS[0][n] + lam[1] * VECTORS[1][n] for n in ("w", "b")}
        return sum(entropy_loss(apply(params, x, i)) for i, x in enumerate(batches))

    for key in jax.random.split(KEY, 3):
        updates, state = optimizer.update(slope(lam, inputs(key)), state)
        lam = optax.apply_updates(lam, updates)
    np.testing.assert_allclose(found.coefficients, lam, rtol=1e-4)
    assert set(ada_merging(apply, BASE, VECTORS, inputs, KEY, steps=1).coefficients) == {"w", "b"}
    kept = ada_merging(apply, BASE, VECTORS, inputs, KEY, steps=40, learning_rate=1.0, clamp=True)
    assert all(0 <= float(v.min()) <= float(v.max()) <= 1 for v in jax.tree.leaves(kept.coefficients))


@functools.cache
def two_levels(**options):
    return concrete_ada_merging(apply, BASE, VECTORS, inputs, KEY, steps=5, adaptation_steps=5, **options)


@pytest.mark.parametrize(
    "options", [{}, {"lam_at": "previous", "resample_outer": True}, {"coefficients": "task", "discrete": True}]
)
def test_the_two_levels(options):
    found = two_levels(**options)
    assert found.losses.shape == (5,)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(found.params))
    assert float(jnp.abs(found.logits["w"]).max()) > 0
    if options.get("lam_at"):
        assert float(jnp.abs(found.logits["w"] - two_levels().logits["w"]).max()) > 0


def test_refusals():
    with pytest.raises(StructureError, match="at least one task vector"):
        init_logits([])
    with pytest.raises(StructureError, match=r"^w: task vector 0 has shape \(4, 3\), vector 1 None"):
        init_logits([VECTORS[0], VECTORS[1] | {"w": None}])
    with pytest.raises(ValueError, match="temperature"):
        sample_mask(KEY, {"w": jnp.zeros(2)}, 0.0)
    whole = sample_mask(KEY, init_logits(VECTORS))
    for mask, message in (
        (whole | {"more": jnp.ones(2)}, r"^more: the mask has \(2,\) here, the task vectors have nothing"),
        (whole | {"w": None}, r"^w: the mask has nothing here, the task vectors have \(4, 3\)"),
        (whole | {"w": jnp.ones((1, 3))}, r"^w: the mask has \(1, 3\) here"),
    ):
        with pytest.raises(StructureError, match=message):
            add_masked(BASE, VECTORS, 0.3, mask)
        with pytest.raises(StructureError, match=message):
            ada_merging(apply, BASE, VECTORS, inputs, KEY, mask=mask, steps=1)
    with pytest.raises(RankError, match="steps"):
        concrete_task_arithmetic(apply, BASE, VECTORS, inputs, KEY, steps=0)
    with pytest.raises(ValueError, match="coefficients"):
        ada_merging(apply, BASE, VECTORS, inputs, KEY, coefficients="leaf")
