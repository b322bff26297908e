import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError

from .helpers import adapt, close, compare_gradients, lora, merged, normal, weighted_sum

X = normal(0, 5, 6)
PARAMS = {"a": {"w": normal(1, 6, 8), "b": normal(2, 8)}, "out": normal(3, 8, 4), "n": np.int32(2)}
RULES = {"a/w": lora(), "a/b": sj.full(), "out": sj.dora(lora())}


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["out"]


def test_two_trees_with_holes():
    adapted = sj.adapt(PARAMS, RULES, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    assert (trainable["a"]["w"].base, trainable["n"]) == (None, None)
    assert trainable["a"]["b"].value is PARAMS["a"]["b"]
    assert frozen["a"]["b"].value is None
    assert frozen["a"]["w"].a is None
    assert frozen["a"]["w"].base is PARAMS["a"]["w"]
    assert trainable["out"].magnitude.shape == (4,)
    assert trainable["out"].direction.a.shape == (8, 2)
    assert frozen["out"].direction.base is PARAMS["out"]
    assert len(jax.tree.leaves(trainable)) == 2 + 1 + 3
    # Base and scale of two, the frozen part of DoRA's column lengths, and the leaf that is left alone.
    assert len(jax.tree.leaves(frozen)) == 2 * 2 + 1 + 1
    back = sj.combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(adapted), strict=True):
        assert one is other


def test_summary_counts_what_partition_gives():
    adapted = sj.adapt(PARAMS, RULES, key=jax.random.key(0))
    assert sj.summary(adapted).trainable == sum(v.size for v in jax.tree.leaves(sj.partition(adapted)[0]))


def test_optimizer_state_and_updates_are_trees_of_what_learns():
    adapted = sj.adapt(PARAMS, RULES, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = tx.init(trainable)
    apply = sj.with_adapters(mlp)
    loss = lambda t: (apply(sj.combine(t, frozen), X) ** 2).mean()

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return value, optax.apply_updates(trainable, updates), state

    before, trainable, state = step(trainable, state)
    for _ in range(3):
        after, trainable, state = step(trainable, state)
    assert after < before
    sizes = {v.size for v in jax.tree.leaves(state)}
    assert PARAMS["a"]["w"].size not in sizes
    moved = sj.combine(trainable, frozen)
    np.testing.assert_array_equal(moved["a"]["w"].base, PARAMS["a"]["w"])


def test_trees_that_do_not_fit_are_refused():
    adapted = sj.adapt(PARAMS, RULES, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    with pytest.raises(StructureError, match=r"a/b: both trees have a value"):
        sj.combine(adapted, adapted)
    with pytest.raises(StructureError, match="differ in structure"):
        sj.combine(trainable, {"other": frozen})
    with pytest.raises(StructureError, match=r"a/w/a is in the trainable one only.*partition"):
        sj.combine(trainable, {**frozen, "a": {"w": None, "b": None}})
    # A hole meets a whole subtree: not an array, so not the trees of one partition.
    with pytest.raises(StructureError, match=r"x is in the trainable one only"):
        sj.combine({"x": None}, {"x": {"deep": jnp.ones(2)}})
    with pytest.raises(StructureError, match=r"x: both trees have a value"):
        sj.combine({"x": 1.0}, {"x": 2.0})
    other = sj.adapt(
        PARAMS, {"a/w": sj.lora(3, dropout=0.1), "a/b": sj.full(), "out": sj.dora(lora())}, key=jax.random.key(0)
    )
    with pytest.raises(StructureError, match="differ in structure"):
        sj.combine(sj.partition(other)[0], frozen)


def test_frozen_parts_get_exactly_zero_gradient():
    """Differentiating the whole adapted tree: each frozen field's gradient is zero to the last bit."""
    params = {k: v for k, v in PARAMS.items() if k != "n"}
    adapted = adapt(params, RULES)
    apply = sj.with_adapters(mlp)
    found = jax.jit(jax.grad(lambda p: weighted_sum(apply(p, X))))(adapted)
    assert not np.asarray(found["a"]["w"].base).any()
    assert not np.asarray(found["out"].direction.base).any()
    for learned in (found["a"]["w"].a, found["a"]["w"].b, found["a"]["b"].value, found["out"].magnitude):
        assert np.asarray(learned).any()
    plain = adapt(params, {"a/w": lora(), "a/b": sj.full(), "out": lora()})
    trainable_gradient = sj.partition(jax.grad(lambda p: weighted_sum(apply(p, X)))(plain))[0]
    compare_gradients(trainable_gradient, jax.grad(lambda p: weighted_sum(mlp(p, X)))(merged(plain)), plain)


@pytest.mark.parametrize("materialized", [False, True])
def test_frozen_factor_and_frozen_merge(materialized):
    weight = dataclasses.replace(adapt({"w": normal(1, 6, 4)})["w"], trainable=("b",))
    run = (lambda w: X @ w.materialize()) if materialized else sj.with_adapters(lambda w: X @ w)
    found = jax.grad(lambda w: weighted_sum(run(w)))(weight)
    assert not np.asarray(found.a).any()
    assert not np.asarray(found.base).any()
    assert np.asarray(found.b).any()


def flops(function, *args):
    found = jax.jit(function).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, (list, tuple)) else found)["flops"]


@pytest.mark.optimized
def test_frozen_gradients_are_not_computed():
    """The compiled step has no product of a frozen gradient, even where the caller differentiates everything."""
    x, n, m = normal(0, 64, 96), 96, 96
    params = {"in": normal(1, n, m), "out": normal(2, m, n)}
    fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
    adapted = adapt(params)
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(fn)
    norm = lambda tree: sum(jnp.vdot(v, v) for v in jax.tree.leaves(tree))  # uses every gradient that there is
    loss = lambda p, x: jnp.sin(apply(p, x)).sum()
    only = flops(lambda t, f, x: norm(jax.grad(lambda t: loss(sj.combine(t, f), x))(t)), trainable, frozen, x)
    everything = flops(lambda p, x: norm(jax.grad(loss)(p, x)), adapted, x)
    full = flops(lambda p, x: norm(jax.grad(lambda p: jnp.sin(fn(p, x)).sum())(p)), params, x)
    one_product = 2 * 64 * n * m
    # Summing the squares of the zeros that stand for frozen gradients is all that may be added.
    assert everything - only < 3 * 2 * n * m
    # Forward twice and backward to the hidden layer once are needed; two weight gradients are not.
    assert full > 4.9 * one_product
    assert everything < 3.7 * one_product


# Dropout.


def dropping(params, roles=None, rules="**", rate=0.5, seed=7):
    return adapt(params, {rules: sj.lora(2, alpha=3.0, dropout=rate)}, roles, seed)


def test_nothing_is_dropped_without_a_key():
    adapted = dropping({"w": normal(1, 6, 4)})
    close(sj.with_adapters(lambda p: X @ p["w"])(adapted), X @ merged(adapted)["w"])
    none = adapt({"w": normal(1, 6, 4)})
    same = sj.with_dropout(none, jax.random.key(0))
    assert same["w"].dropout_key is None


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "old style"])
def test_dropout_drops_inputs_of_the_factors_only(key):
    adapted = dropping({"w": normal(1, 6, 4)})
    weight = adapted["w"]
    out = sj.with_adapters(lambda p: np.eye(6, dtype=np.float32) @ p["w"])(sj.with_dropout(adapted, key))
    # Row i is the base's row i plus either nothing or twice the factors' row: each entry of x is kept or dropped.
    addition = np.asarray(out) - np.asarray(weight.base)
    product = 1.5 * np.asarray(weight.a) @ np.asarray(weight.b)
    rate = (addition / product)[:, 0]
    np.testing.assert_allclose(addition, rate[:, None] * product, atol=1e-5)
    assert all(min(abs(r), abs(r - 2)) < 1e-4 for r in rate)


def test_mean_over_keys_is_the_deterministic_output():
    adapted = dropping({"w": normal(1, 6, 4)}, rate=0.3)
    apply = sj.with_adapters(lambda p: X @ p["w"])
    many = jax.jit(jax.vmap(lambda key: apply(sj.with_dropout(adapted, key))))(
        jax.random.split(jax.random.key(1), 4000)
    )
    mean, error = many.mean(0), many.std(0) / np.sqrt(4000)
    assert np.all(np.abs(mean - X @ merged(adapted)["w"]) < 5 * error + 1e-5)


def masks(adapted, fn, key):
    """Whether each of many ones reaches the output: the base is zero, the factors pick the first feature."""
    return np.asarray(sj.with_adapters(fn)(sj.with_dropout(adapted, key))) > 0


def picking(*stack):
    """A weight whose output tells which of 400 rows' first entry was kept."""
    made = dropping(
        {"w": np.zeros((*stack, 4, 4), np.float32)},
        {"w": sj.Role.dense((-2 % (len(stack) + 2),), (len(stack) + 1,), tuple(range(len(stack))))},
    )
    weight = made["w"]
    return dataclasses.replace(weight, a=jnp.zeros_like(weight.a).at[..., 0, 0].set(1), b=jnp.ones_like(weight.b))


ONES = np.ones((400, 4), np.float32)


def independent(left, right):
    """Agreement of two fair coins tossed 400 times: 200 +- 10."""
    return abs(int((left == right).sum()) - 200) < 60


def test_each_weight_has_a_key_of_its_own():
    keyed = sj.with_dropout({"one": picking(), "two": picking(), "stack": picking(3)}, jax.random.key(0))
    keys = [jax.random.key_data(keyed[n].dropout_key).reshape(-1, 2) for n in ("one", "two", "stack")]
    assert len({tuple(map(int, k)) for k in np.concatenate(keys)}) == 5


def test_masks_are_independent_across_weights_keys_and_uses():
    tree = {"one": picking(), "two": picking()}
    fn = lambda p: (ONES @ p["one"], ONES @ p["two"], ONES @ p["one"])
    apply = sj.with_adapters(fn)
    first = [np.asarray(v)[:, 0] > 0 for v in apply(sj.with_dropout(tree, jax.random.key(0)))]
    again = [np.asarray(v)[:, 0] > 0 for v in jax.jit(apply)(sj.with_dropout(tree, jax.random.key(0)))]
    other = [np.asarray(v)[:, 0] > 0 for v in apply(sj.with_dropout(tree, jax.random.key(1)))]
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert independent(one, different)
    assert independent(first[0], first[1])
    assert independent(first[0], first[2])


@pytest.mark.parametrize("loop", ["scan", "remat", "fori_loop", "python"])
def test_stacked_layers_have_masks_of_their_own(loop):
    weight = picking(3)

    def fn(w):
        if loop == "scan":
            return jax.lax.scan(lambda c, one: (c, ONES @ one), 0.0, w)[1]
        if loop == "remat":
            return jax.lax.scan(jax.checkpoint(lambda c, one: (c, ONES @ one)), 0.0, w)[1]
        if loop == "fori_loop":
            take = lambda i: ONES @ jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False)
            return jax.lax.fori_loop(0, 3, lambda i, out: out.at[i].set(take(i)), jnp.zeros((3, 400, 4)))
        return jnp.stack([ONES @ w[i] for i in range(3)])

    first, second, third = masks(weight, fn, jax.random.key(0))[..., 0]
    assert independent(first, second)
    assert independent(first, third)
    assert independent(second, third)


def test_remat_repeats_the_mask_in_the_backward_pass():
    adapted = dropping({"w": normal(1, 6, 6)})
    trainable, frozen = sj.partition(sj.with_dropout(adapted, jax.random.key(3)))
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    apply = sj.with_adapters(lambda p: weighted_sum(layer(layer(X, p["w"]), p["w"])))
    loss = jax.jit(lambda t: apply(sj.combine(t, frozen)))
    found = jax.grad(loss)(trainable)
    direction = jax.tree.map(lambda v: jnp.asarray(normal(9, *v.shape)), trainable)
    moved = lambda s: loss(jax.tree.map(lambda v, d: v + s * d, trainable, direction))
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True))
    close(slope, (moved(1e-3) - moved(-1e-3)) / 2e-3, 1e-2)


def test_key_of_no_kind_is_refused():
    with pytest.raises((TypeError, ValueError)):
        sj.with_dropout(dropping({"w": normal(1, 6, 4)}), "seed")
