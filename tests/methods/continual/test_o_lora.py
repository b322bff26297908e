"""O-LoRA: the penalty against loops in numpy, and tasks that follow each other in arrays of one shape."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError

RANK, TASKS = 2, 3


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {"dense": random(10, 6), "layers": random(2, 6, 8, seed=1), "head": random(8, 3, seed=2)}


def model(params, x):
    x = jnp.tanh(x @ params["dense"])
    for i in range(2):
        x = jnp.tanh(x @ params["layers"][i])[:, :6]
    return jnp.pad(x, ((0, 0), (0, 2))) @ params["head"]


def adapted():
    rules = {"{dense,layers}": sj.o_lora(RANK, tasks=TASKS, alpha=8.0), "head": sj.full()}
    return sj.adapt(params(), rules, key=jax.random.key(0), roles=sj.roles(model, params(), jnp.ones((1, 10))))


def with_factors(tree, seed):
    """The tree with drawn factors, as if a task had trained them."""
    trainable, frozen = sj.partition(tree)
    drawn = jax.tree.map(lambda v: random(*v.shape, seed=seed), trainable)
    return sj.combine(drawn, frozen)


def after_tasks(count):
    """The tree after some tasks, and the factors that each of them had, by path."""
    tree, history = adapted(), []
    for task in range(count):
        tree = with_factors(tree, 10 + task)
        history.append({n: (np.asarray(tree[n].a), np.asarray(tree[n].b)) for n in ("dense", "layers")})
        tree = sj.methods.o_lora.next_task(tree, task, key=jax.random.key(task))
    return tree, history


def test_starts_as_the_model_and_learns_one_pair():
    tree = adapted()
    x = random(4, 10)
    np.testing.assert_array_equal(sj.with_adapters(model)(tree, x), model(params(), x))
    trainable, _ = sj.partition(tree)
    shapes = [v.shape for v in jax.tree.leaves({n: trainable[n] for n in ("dense", "layers")})]
    assert shapes == [(10, 2), (2, 6), (2, 6, 2), (2, 2, 8)]
    a = np.asarray(tree["dense"].a)
    assert not np.asarray(tree["dense"].b).any()
    assert 0.5 / np.sqrt(10) < np.abs(a).max() <= 1 / np.sqrt(10)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merge_is_the_sum_of_all_tasks(count):
    tree, history = after_tasks(count)
    current = with_factors(tree, 20)
    merged = sj.merge(current)
    for name in ("dense", "layers"):
        total = np.asarray(params()[name], np.float64)
        for a, b in [task[name] for task in history] + [(current[name].a, current[name].b)]:
            total = total + 8.0 / RANK * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
        np.testing.assert_allclose(merged[name], total, atol=1e-4)
    x = random(4, 10, seed=5)
    np.testing.assert_allclose(sj.with_adapters(model)(current, x), model(merged, x), atol=1e-4)


def test_finishing_a_task_changes_no_output_and_no_shape():
    tree = with_factors(adapted(), 3)
    done = jax.jit(sj.methods.o_lora.next_task)(tree, 1, key=jax.random.key(1))
    x = random(4, 10, seed=5)
    np.testing.assert_allclose(sj.with_adapters(model)(done, x), sj.with_adapters(model)(tree, x), atol=1e-4)
    assert jax.tree.structure(done) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, done) == jax.tree.map(jnp.shape, tree)
    np.testing.assert_array_equal(done["dense"].base.a[:, 2:4], tree["dense"].a)
    assert not done["dense"].b.any()
    assert bool(jnp.any(done["dense"].a != tree["dense"].a))
    np.testing.assert_array_equal(done["head"].value, tree["head"].value)


@pytest.mark.parametrize(("overlap_weight", "norm_weight"), [(0.5, 0.0), (1.0, 0.1), (0.0, 2.0)])
def test_penalty_is_that_of_loops(overlap_weight, norm_weight):
    tree, history = after_tasks(2)
    current = with_factors(tree, 20)
    expected = 0.0
    for name in ("dense", "layers"):
        new_a, new_b = (np.asarray(v, np.float64) for v in (current[name].a, current[name].b))
        layers = [()] if name == "dense" else [(0,), (1,)]
        for layer, task in itertools.product(layers, history):
            old = np.asarray(task[name][0], np.float64)[layer]
            expected += overlap_weight * sum(
                abs(old[:, i] @ new_a[layer][:, j]) for i, j in itertools.product(range(RANK), range(RANK))
            )
        for layer in layers:
            expected += norm_weight * (np.linalg.norm(new_a[layer]) + np.linalg.norm(new_b[layer]))
    np.testing.assert_allclose(sj.methods.o_lora.penalty(current, overlap_weight, norm_weight), expected, rtol=1e-5)


def test_penalty_is_zero_at_the_first_task_and_for_orthogonal_factors():
    assert float(sj.methods.o_lora.penalty(with_factors(adapted(), 1))) == 0.0
    tree, _ = after_tasks(1)

    def orthogonal(weight):
        old = np.asarray(weight.base.a)[..., :RANK]
        q = np.linalg.qr(np.concatenate([old, np.asarray(weight.a)], -1))[0]
        return dataclasses.replace(weight, a=jnp.asarray(q[..., RANK:]))

    tree = {n: orthogonal(w) if n != "head" else w for n, w in tree.items()}
    assert float(sj.methods.o_lora.penalty(tree)) < 1e-4


@pytest.mark.parametrize("norm_weight", [0.0, 0.1])
def test_gradient_of_the_penalty_is_finite_and_reaches_the_new_factors_alone(norm_weight):
    tree, _ = after_tasks(1)  # the new b is zero, where a norm has no derivative
    trainable, frozen = sj.partition(tree)
    found = jax.jit(jax.grad(lambda t: sj.methods.o_lora.penalty(sj.combine(t, frozen), norm_weight=norm_weight)))(
        trainable
    )
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(found))
    old, new = (np.asarray(v, np.float64) for v in (tree["dense"].base.a, tree["dense"].a))
    expected = 0.5 * old @ np.sign(old.T @ new) + norm_weight * new / np.linalg.norm(new)
    np.testing.assert_allclose(found["dense"].a, expected, atol=1e-5)
    assert not found["dense"].b.any()
    whole = jax.jit(jax.grad(lambda t: sj.methods.o_lora.penalty(t, norm_weight=norm_weight)))(tree)
    assert not any(v.any() for v in jax.tree.leaves(sj.partition(whole)[1]))


def test_training_with_the_penalty_turns_the_new_factor_away():
    tree, _ = after_tasks(1)
    trainable, frozen = sj.partition(tree)
    optimizer = optax.sgd(optax.linear_schedule(0.02, 0.0, 200))
    loss = lambda t: sj.methods.o_lora.penalty(sj.combine(t, frozen))

    def step(carry, _):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (end, _), _ = jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, length=200)
    assert float(loss(end)) < 0.05 * float(loss(trainable))


def test_bad_input_is_refused():
    with pytest.raises(RankError, match="rank=0"):
        sj.o_lora(0, tasks=2)
    with pytest.raises(RankError, match="tasks="):
        sj.o_lora(2, tasks=1.5)
    with pytest.raises(ValueError, match="dropout=1"):
        sj.o_lora(2, tasks=2, dropout=1.0)
    with pytest.raises(StructureError, match=r"dense: task 3; there is room for tasks 0 to 2"):
        sj.methods.o_lora.next_task(adapted(), 3, key=jax.random.key(0))
    with pytest.raises(StructureError, match="no weights of o_lora"):
        sj.methods.o_lora.penalty(params())
    trainable, _ = sj.partition(adapted())
    with pytest.raises(StructureError, match="combine"):
        sj.methods.o_lora.penalty(trainable)


def test_a_weight_is_known_by_its_parts_and_not_by_a_name():
    adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.o_lora(2, tasks=3)}, key=jax.random.key(0))
    renamed = {"w": dataclasses.replace(adapted["w"], method="another", base=adapted["w"].base)}
    assert sj.methods.o_lora.next_task(renamed, 1, key=jax.random.key(1))["w"].base.a[:, 2:4].any()
    inner = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(6)}, key=jax.random.key(0))["w"]
    plain = {"w": dataclasses.replace(adapted["w"], base=inner)}
    with pytest.raises(StructureError, match="no weights of o_lora"):
        sj.methods.o_lora.penalty(plain)


def test_alpha_and_numpy_integers():
    adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.o_lora(np.int64(2), tasks=3)}, key=jax.random.key(0))
    assert (float(adapted["w"].scale), adapted["w"].scale.dtype) == (16.0, jnp.float32)
