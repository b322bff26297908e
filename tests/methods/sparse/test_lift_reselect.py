"""Selecting anew: values and moments are taken along, shapes and programs stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from tests.tolerances import tolerance

METHOD = sj.lift(1, filter_rank=2)
OPTIMIZERS = {
    "lift_adam": sj.methods.lift.lift_adam(0.3),
    "adam_clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.3)),
    "accumulated": optax.MultiSteps(optax.adam(0.3), 1),
    "two_rates": optax.multi_transform(
        {"head": optax.adam(0.1), "lift": sj.methods.lift.lift_adam(0.3)},
        lambda t: jax.tree_util.tree_map_with_path(lambda p, _: "head" if "head" in str(p) else "lift", t),
    ),
}


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(6, 5)), dtype),
        "stack": jnp.asarray(rng.normal(size=(2, 6, 5)), dtype),
        "head": jnp.asarray(rng.normal(size=(6, 5)), dtype),
    }
    roles = {"stack": sj.Role.dense((1,), (2,), (0,))}
    return sj.adapt(params, {"head": sj.full(), "*": METHOD}, key=jax.random.key(0), roles=roles)


def loss(adapted):
    merged = jax.tree.map(lambda w: w.materialize(jnp.float32), adapted, is_leaf=sj.core.is_weight)
    return sum(jnp.sum(jnp.sin(3 * v + 1)) for v in merged.values())


slope = jax.jit(jax.grad(lambda t, f: loss(sj.combine(t, f))))


def train(adapted, optimizer, state, steps):
    for _ in range(steps):
        trainable, frozen = sj.partition(adapted)
        gradients = slope(trainable, frozen)
        updates, state = jax.jit(optimizer.update)(gradients, state, trainable)
        adapted = sj.combine(optax.apply_updates(trainable, updates), frozen)
    return adapted, state


def arrays_at(state, shape):
    return [np.asarray(v) for v in jax.tree.leaves(state) if getattr(v, "shape", None) == shape]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_moments_are_scattered_to_dense_and_gathered(name):
    optimizer = OPTIMIZERS[name]
    adapted = start()
    adapted, state = train(adapted, optimizer, optimizer.init(sj.partition(adapted)[0]), 6)
    new, new_state = sj.methods.lift.reselect_principal(adapted, state, METHOD, key=jax.random.key(1))
    old_indices, new_indices = np.asarray(adapted["w"].indices), np.asarray(new["w"].indices)
    assert set(old_indices) != set(new_indices)
    moments = arrays_at(state, (11,))
    assert len(moments) >= 2
    for before, after in zip(moments, arrays_at(new_state, (11,)), strict=True):
        dense = np.zeros(30, np.float32)
        dense[old_indices] = before
        np.testing.assert_array_equal(after, dense[new_indices])
    for before, after in zip(arrays_at(state, (2, 11)), arrays_at(new_state, (2, 11)), strict=True):
        for layer in range(2):
            dense = np.zeros(30, np.float32)
            dense[np.asarray(adapted["stack"].indices[layer])] = before[layer]
            np.testing.assert_array_equal(after[layer], dense[np.asarray(new["stack"].indices[layer])])
    # What is trained as it is, and every counter, stay as they are.
    for shape in ((6, 5), ()):
        for before, after in zip(arrays_at(state, shape), arrays_at(new_state, shape), strict=True):
            np.testing.assert_array_equal(before, after)
    assert any(v == 6 for v in arrays_at(new_state, ()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_learned_is_written_into_the_weight(dtype):
    optimizer = OPTIMIZERS["lift_adam"]
    adapted = start(dtype)
    adapted, state = train(adapted, optimizer, optimizer.init(sj.partition(adapted)[0]), 6)
    new, _ = sj.methods.lift.reselect_principal(adapted, state, METHOD, key=jax.random.key(1))
    merged = np.asarray(sj.merge(adapted)["w"])
    np.testing.assert_array_equal(new["w"].base, merged)
    np.testing.assert_array_equal(sj.merge(new)["w"], merged)
    fresh = sj.adapt({"w": jnp.asarray(merged)}, {"w": METHOD}, key=jax.random.key(2))["w"]
    np.testing.assert_array_equal(new["w"].indices, fresh.indices)
    # A position that stays keeps its value in float32, not what the storage dtype rounds it to.
    common, old, now = np.intersect1d(adapted["w"].indices, new["w"].indices, return_indices=True)
    assert 0 < len(common) < 11
    np.testing.assert_array_equal(np.asarray(new["w"].values)[now], np.asarray(adapted["w"].values)[old])


def test_selecting_anew_compiles_nothing_again():
    optimizer = OPTIMIZERS["lift_adam"]
    traces = {"step": 0, "select": 0}

    @jax.jit
    def step(adapted, state):
        traces["step"] += 1
        return train(adapted, optimizer, state, 1)

    @jax.jit
    def select(adapted, state, key):
        traces["select"] += 1
        return sj.methods.lift.reselect_principal(adapted, state, METHOD, key=key)

    adapted = start()
    state = optimizer.init(sj.partition(adapted)[0])
    shapes = jax.tree.map(jnp.shape, (adapted, state))
    for n in range(1, 13):
        adapted, state = step(adapted, state)
        if sj.methods.lift.refresh_due(n, 4):
            adapted, state = select(adapted, state, jax.random.key(n))
    assert traces == {"step": 1, "select": 1}
    assert jax.tree.map(jnp.shape, (adapted, state)) == shapes


def test_all_entries_selected_is_dense_adam():
    method, optimizer = sj.lift(30, filter_rank=2), sj.methods.lift.lift_adam(0.1)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    adapted = sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0))
    dense = sj.adapt({"w": w}, {"w": sj.full()}, key=jax.random.key(0))
    adapted, state = train(adapted, optimizer, optimizer.init(sj.partition(adapted)[0]), 5)
    adapted, state = sj.methods.lift.reselect_principal(adapted, state, method, key=jax.random.key(1))
    adapted, _ = train(adapted, optimizer, state, 5)
    dense, _ = train(dense, optimizer, optimizer.init(sj.partition(dense)[0]), 10)
    np.testing.assert_allclose(sj.merge(adapted)["w"], sj.merge(dense)["w"], atol=tolerance(size=4))
    assert np.abs(np.asarray(sj.merge(dense)["w"]) - w).max() > 0.1


def test_refresh_is_due_as_released():
    assert [n for n in range(1, 1300) if sj.methods.lift.refresh_due(n, 400)] == [399, 799, 1199]
    assert bool(jax.jit(sj.methods.lift.refresh_due, static_argnums=1)(jnp.asarray(9), 10))


def test_wrong_methods_are_refused_by_name():
    adapted = start()
    with pytest.raises(StructureError, match="No weight was made by 'lora'"):
        sj.methods.lift.reselect_principal(adapted, (), sj.lora(2), key=jax.random.key(0))
    with pytest.raises(StructureError, match="selected 11 entries and now selects 22"):
        sj.methods.lift.reselect_principal(adapted, (), sj.lift(2, filter_rank=2), key=jax.random.key(0))
