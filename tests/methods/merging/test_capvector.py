"""CapVector: the algebra of its vectors, closed forms of its penalties, and LoRA's factors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, StructureError
from subspace_jax.methods.merging.capvector import (
    add_capability,
    avoid_directions,
    capability_penalty,
    capability_vector,
    factor_penalty,
    input_directions,
)
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
KINDS = ("abs_inner", "sq_inner", "abs_elem", "cosine")


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), dtype)
    return {"a": {"kernel": draw(4, 3), "bias": draw(3)}, "stacked": draw(2, 3, 5)}


def test_vectors_are_differences_and_add_up():
    base, plain, auxiliary = tree(0), tree(1), tree(2)
    gamma = capability_vector(auxiliary, plain)
    jax.tree.map(lambda g, x, y: assert_rounding(g, np.asarray(x, np.float64) - y, size=4), gamma, auxiliary, plain)
    back = capability_vector(plain, auxiliary)
    jax.tree.map(lambda g, h: np.testing.assert_array_equal(g, -h), gamma, back)
    common = tree(3)
    moved = capability_vector(*(jax.tree.map(jnp.add, t, common) for t in (auxiliary, plain)))
    jax.tree.map(lambda g, h: assert_rounding(g, h, size=16), moved, gamma)
    assert all(float(jnp.abs(v).max()) == 0 for v in jax.tree.leaves(capability_vector(plain, plain)))
    np.testing.assert_array_equal(add_capability(base, gamma, 0.0)["stacked"], base["stacked"])
    whole = add_capability(base, gamma)
    jax.tree.map(lambda w, b, g: assert_rounding(w - b, g, size=16), whole, base, gamma)
    two = add_capability(base, [gamma, common], [0.5, {"**/kernel": 2.0}])
    assert_rounding(
        two["a"]["kernel"], base["a"]["kernel"] + 0.5 * gamma["a"]["kernel"] + 2 * common["a"]["kernel"], size=16
    )
    assert_rounding(two["a"]["bias"], base["a"]["bias"] + 0.5 * gamma["a"]["bias"], size=16)
    low = add_capability(tree(0, jnp.bfloat16), gamma)
    assert low["stacked"].dtype == jnp.bfloat16


def test_leaves_can_be_left_out_and_adapters_are_formed():
    params = {"w": jnp.ones((4, 3)), "head": jnp.ones(3), "step": jnp.int32(3)}
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY)
    trained = sj.combine(jax.tree.map(lambda v: v + 0.3, sj.partition(adapted)[0]), sj.partition(adapted)[1])
    gamma = capability_vector(trained | {"projection": jnp.ones(2)}, adapted, select="w")
    assert gamma["head"] is None
    assert gamma["step"] is None
    assert_rounding(gamma["w"], sj.merge(trained)["w"] - params["w"], size=16)
    assert add_capability(params, gamma)["step"] == 3


def test_least_squares_gives_the_difference_of_the_two_solutions():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(40, 5)), rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    plain = np.linalg.lstsq(x, y, rcond=None)[0]
    auxiliary = np.linalg.solve(2 * x.T @ x, x.T @ (y + z))  # beta 1: the same read-out of another target
    gradient = lambda w, t: x.T @ (x @ w - t) / 40

    def train(gradients):
        w = np.zeros((5, 2))
        for _ in range(4000):
            w -= 0.2 * gradients(w)
        return {"w": jnp.asarray(w, jnp.float32)}

    gamma = capability_vector(train(lambda w: gradient(w, y) + gradient(w, z)), train(lambda w: gradient(w, y)))
    np.testing.assert_allclose(gamma["w"], auxiliary - plain, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_are_zero_at_the_start_and_are_their_formulas(kind):
    start, gamma = tree(0), {**tree(1), "stacked": None}
    value, slope = jax.jit(jax.value_and_grad(lambda p: capability_penalty(p, start, gamma, kind)))(start)
    assert float(value) == 0.0
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(slope))
    change, params = tree(5), jax.tree.map(jnp.add, start, tree(5))
    expected = 0.0
    for g, d in ((gamma["a"][n], change["a"][n]) for n in ("kernel", "bias")):
        g, d = np.asarray(g, np.float64), np.asarray(d, np.float64)
        inner = np.sum(g * d)
        expected += {
            "abs_inner": abs(inner),
            "sq_inner": inner**2,
            "abs_elem": np.sum(np.abs(g * d)),
            "cosine": (inner / (np.linalg.norm(g) * np.linalg.norm(d) + 1e-8)) ** 2,
        }[kind]
    np.testing.assert_allclose(capability_penalty(params, start, gamma, kind), expected, rtol=1e-4)
    scaled = jax.tree.map(lambda v: -3.0 * v, gamma)
    factor = {"abs_inner": 3.0, "sq_inner": 9.0, "abs_elem": 3.0, "cosine": 1.0}[kind]
    np.testing.assert_allclose(capability_penalty(params, start, scaled, kind), factor * expected, rtol=1e-4)
    slope = jax.jit(jax.grad(lambda p: capability_penalty(p, start, gamma, kind)))(params)
    assert float(jnp.abs(slope["stacked"]).max()) == 0.0
    if kind != "abs_elem":
        g, d = gamma["a"]["kernel"], change["a"]["kernel"]
        along = start | {"a": start["a"] | {"kernel": start["a"]["kernel"] + d - g * jnp.sum(g * d) / jnp.sum(g * g)}}
        np.testing.assert_allclose(capability_penalty(along, start, gamma, kind), 0.0, atol=2e-5)


@pytest.mark.parametrize("kind", ["sq_inner", "abs_inner"])
def test_quadratic_tasks_end_at_the_closed_forms(kind):
    gamma, wanted, weight = np.array([1.0, -2.0, 0.5]), np.array([0.8, -0.5, 2.0]), 0.1
    start, inner = {"w": jnp.zeros(3)}, float(gamma @ wanted)
    loss = lambda p: (
        0.5 * jnp.sum((p["w"] - wanted) ** 2)
        + weight * capability_penalty(p, start, {"w": jnp.asarray(gamma, jnp.float32)}, kind)
    )
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.3, 600))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (end, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=600))((start, optimizer.init(start)))
    norm = float(gamma @ gamma)
    reached = (
        inner / (1 + 2 * weight * norm) if kind == "sq_inner" else np.sign(inner) * max(abs(inner) - weight * norm, 0)
    )
    expected = wanted + gamma * (reached - inner) / norm
    np.testing.assert_allclose(end["w"], expected, atol=2e-3)


def test_factors_of_lora_enter_without_their_product():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    adapted = sj.adapt(params, {"w": sj.lora(2, alpha=6.0)}, key=KEY)
    trained = {"w": dataclasses.replace(adapted["w"], b=adapted["w"].b + 0.4)}
    gamma = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    for kind in KINDS:
        one = capability_penalty(trained, params, gamma, kind)
        other = capability_penalty(sj.merge(trained), params, gamma, kind)
        np.testing.assert_allclose(one, other, rtol=2e-4)


def test_directions_are_leading_singular_vectors_and_are_avoided_at_the_start():
    rng = np.random.default_rng(0)
    gamma = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "b": jnp.ones(5), "none": None}
    found = input_directions(gamma, 2)
    assert list(found) == ["w"]
    u, s, _ = np.linalg.svd(np.asarray(gamma["w"], np.float64))
    np.testing.assert_allclose(np.abs(found["w"]), np.abs(u[:, :2] * s[:2] / s[:2].sum()), atol=1e-5)
    adapted = sj.adapt({"w": jnp.ones((6, 5))}, {"w": sj.lora(3)}, key=KEY)
    overlap = np.sum(np.abs(np.asarray(found["w"]).T @ np.asarray(adapted["w"].a)))
    np.testing.assert_allclose(factor_penalty(adapted, found), overlap, rtol=1e-5)
    kept = avoid_directions(adapted, found)
    assert float(factor_penalty(kept, found)) < 1e-6
    expected = (np.eye(6) - u[:, :2] @ u[:, :2].T) @ np.asarray(adapted["w"].a)
    np.testing.assert_allclose(kept["w"].a, expected, atol=1e-5)
    slope = jax.jit(jax.grad(lambda t: factor_penalty(sj.combine(t, sj.partition(kept)[1]), found)))(
        sj.partition(adapted)[0]
    )
    assert float(jnp.abs(slope["w"].b).max()) == 0.0


def test_refusals():
    base, gamma = tree(0), tree(1)
    with pytest.raises(StructureError, match=r"^stacked: capability_vector: .*\(2, 3, 5\).*none"):
        capability_vector({"a": base["a"]}, base)
    with pytest.raises(StructureError, match=r"^extra: vector 0 has this leaf"):
        add_capability(base, gamma | {"extra": jnp.ones(2)})
    with pytest.raises(PatternError, match=r"add_capability: alpha has '\*\*/kernal'"):
        add_capability(base, gamma, {"**/kernal": 1.0})
    with pytest.raises(StructureError, match="2 strengths for 1 vectors"):
        add_capability(base, [gamma], [1.0, 2.0])
    with pytest.raises(StructureError, match=r"^stacked: the start have no leaf of the vector's shape \(2, 3, 5\)"):
        capability_penalty(base, {"a": base["a"]}, gamma)
    with pytest.raises(ValueError, match="kind"):
        capability_penalty(base, base, gamma, "signed")
