"""Turns of coefficients and locations: who moves when, and that who rests keeps every bit."""

from __future__ import annotations

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from tests.tolerances import tolerance


def trainable_tree():
    params = {"w": jnp.ones((12, 7)), "head": jnp.ones((7, 3))}
    return sj.partition(sj.adapt(params, {"w": sj.loca(9), "head": sj.full()}, key=jax.random.key(0)))[0]


def gradient(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), params)


def bits(tree):
    return [np.asarray(v).tobytes() for v in jax.tree.leaves(tree)]


def history(optimizer, steps, params=None):
    """Parameters and states before and after every step, through one compiled program."""
    traces = []

    @jax.jit
    def step(params, state, gradient):
        traces.append(None)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = trainable_tree() if params is None else params
    state = optimizer.init(params)
    seen = [(params, state)]
    for t in range(steps):
        params, state = step(params, state, gradient(params, t))
        seen.append((params, state))
    assert len(traces) == 1
    return seen


def test_first_61_steps_follow_the_published_turns():
    optimizer = sj.methods.loca.alternating(optax.adamw(1e-2, weight_decay=0.1), optax.adam(1e-3), cutoff_step=45)
    seen = history(optimizer, 61)
    for t in range(61):
        (before, old), (after, new) = seen[t], seen[t + 1]
        locations = 10 <= t < 30 or 40 <= t < 45
        moved = bits(before["w"].locations) != bits(after["w"].locations)
        others = [before["w"].coefficients, before["head"]], [after["w"].coefficients, after["head"]]
        assert moved == locations, t
        if locations:
            assert bits(others[0]) == bits(others[1])
            assert bits(old.coefficients) == bits(new.coefficients)
            assert bits(old.locations) != bits(new.locations)
        else:
            assert all(a != b for a, b in zip(bits(others[0]), bits(others[1]), strict=True))
            assert bits(old.locations) == bits(new.locations)
            assert bits(old.coefficients) != bits(new.coefficients)
    last = seen[-1][1]
    assert int(last.count) == 61
    assert int(last.coefficients[0].count) == 36
    assert int(last.locations[0].count) == 25


def test_each_group_takes_the_steps_that_it_would_take_alone():
    optimizer = sj.methods.loca.alternating(
        optax.adamw(1e-2, weight_decay=0.1), optax.adam(1e-3), cutoff_step=45, project=False
    )
    seen = history(optimizer, 61)
    start = seen[0][0]

    def alone(optimizer, pick, turns):
        params = pick(start)
        state = optimizer.init(params)
        for t in turns:
            updates, state = optimizer.update(pick(gradient(start, t)), state, params)
            params = optax.apply_updates(params, updates)
        return params

    turns = [t for t in range(61) if 10 <= t < 30 or 40 <= t < 45]
    locations = alone(optax.adam(1e-3), lambda p: p["w"].locations, turns)
    np.testing.assert_allclose(seen[-1][0]["w"].locations, locations, atol=tolerance(size=4))
    rest = [t for t in range(61) if t not in turns]
    coefficients = alone(optax.adamw(1e-2, weight_decay=0.1), lambda p: p["w"].coefficients, rest)
    np.testing.assert_allclose(seen[-1][0]["w"].coefficients, coefficients, atol=tolerance(size=4))


def test_turns_of_other_lengths():
    optimizer = sj.methods.loca.alternating(
        optax.sgd(1e-2), optax.sgd(1e-3), cutoff_step=7, coefficient_steps=1, location_steps=2, project=False
    )
    seen = history(optimizer, 9)
    moved = [bits(a["w"].locations) != bits(b["w"].locations) for (a, _), (b, _) in itertools.pairwise(seen)]
    assert moved == [False, True, True, False, True, True, False, False, False]


def test_clipping_ignores_the_gradient_of_those_that_rest():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    optimizer = sj.methods.loca.alternating(clipped, clipped, cutoff_step=100)
    params = trainable_tree()
    one = gradient(params, 0)
    huge = {**one, "w": dataclasses.replace(one["w"], locations=1e6 * one["w"].locations)}
    updates, _ = optimizer.update(huge, optimizer.init(params), params)
    moved = [updates["w"].coefficients, *jax.tree.leaves(updates["head"])]
    np.testing.assert_allclose(sum(float(jnp.sum(v**2)) for v in moved), 1.0, rtol=1e-5)


def test_a_negative_zero_that_rests_stays_one():
    optimizer = sj.methods.loca.alternating(optax.sgd(1e-2), optax.sgd(1e-2), cutoff_step=100, coefficient_steps=1)
    params, state = history(optimizer, 1)[-1]
    params = {**params, "head": jax.tree.map(lambda v: -0.0 * jnp.abs(v), params["head"])}
    updates, _ = optimizer.update(gradient(params, 1), state, params)
    moved = optax.apply_updates(params, updates)
    assert bits(moved["w"].locations) != bits(params["w"].locations)
    assert np.signbit(jax.tree.leaves(moved["head"])[0]).all()


@pytest.mark.parametrize("rate", [1e-2, 0.3, 7.0])
def test_projected_locations_end_where_they_have_a_gradient(rate):
    optimizer = sj.methods.loca.alternating(optax.sgd(1.0), optax.sgd(rate), cutoff_step=100, coefficient_steps=1)
    for params, _ in history(optimizer, 8)[2:]:
        u = np.asarray(params["w"].locations)
        assert u.min() >= 0
        assert u.max() <= np.float32(0.999)
    assert (u == 0).any() == (rate > 0.1)


def test_without_projection_a_location_may_leave_and_stays_out():
    optimizer = sj.methods.loca.alternating(
        optax.sgd(1.0), optax.sgd(7.0), cutoff_step=100, coefficient_steps=1, project=False
    )
    u = np.asarray(history(optimizer, 3)[-1][0]["w"].locations)
    assert (u < 0).any()
    assert (u > 1).any()


def test_locations_inside_another_weight_are_found():
    params = {"w": jnp.ones((12, 7))}
    trainable, _ = sj.partition(sj.adapt(params, {"w": sj.dora(sj.loca(9))}, key=jax.random.key(0)))
    optimizer = sj.methods.loca.alternating(optax.sgd(1.0), optax.sgd(7.0), cutoff_step=100, coefficient_steps=1)
    seen = history(optimizer, 3, trainable)
    assert bits(seen[1][0]["w"].magnitude) == bits(seen[2][0]["w"].magnitude)
    assert bits(seen[1][0]["w"].direction.locations) != bits(seen[2][0]["w"].direction.locations)
    assert float(seen[-1][0]["w"].direction.locations.max()) <= 0.999


def test_state_keeps_its_types_and_extra_arguments_arrive():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    optimizer = sj.methods.loca.alternating(inner, optax.adam(1e-3), cutoff_step=5)
    params = trainable_tree()
    state = optimizer.init(params)
    updates, new = optimizer.update(gradient(params, 0), state, params, value=jnp.ones(()))
    assert seen
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_bad_use_is_refused_with_the_mend():
    optimizer = sj.methods.loca.alternating(optax.sgd(1.0), optax.sgd(1.0), cutoff_step=5)
    with pytest.raises(ValueError, match="hold no locations of LoCA"):
        optimizer.init({"w": jnp.ones(3)})
    params = trainable_tree()
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="location_steps=0"):
        sj.methods.loca.alternating(optax.sgd(1.0), optax.sgd(1.0), cutoff_step=5, location_steps=0)
