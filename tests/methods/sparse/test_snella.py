"""SNELLA against numpy: the mixed kernel, the budget's schedule and its sharing, smoothed importance, and a run."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.spatial.distance import cdist
from scipy.special import softmax

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError

snella = sj.methods.snella


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(params, rank=4, **options):
    method = snella.snella(rank, **{"dropout": 0.0, "drop_path": 0.0, **options})
    return sj.adapt(jax.tree.map(jnp.asarray, params), {"**": method}, key=jax.random.key(0))


def scaled(weight, **scalars):
    """Factors of unit size, and other scalars."""
    fields = {n: jnp.asarray(draw(getattr(weight, n).shape, i)) for i, n in enumerate(("a", "b"))}
    return dataclasses.replace(weight, **fields, **{n: jnp.float32(v) for n, v in scalars.items()})


def test_the_mixed_kernel_is_its_equation():
    weight = scaled(adapt({"w": np.zeros((6, 5))})["w"], alpha=0.7, gamma=0.3, shift=-0.2)
    a, b = np.asarray(weight.a, np.float64), np.asarray(weight.b, np.float64)
    d0 = 0.1 * (cdist(a[0], b[0]) - cdist(a[1], b[1]))
    found = np.asarray(weight.matrix(weight.parts()))
    np.testing.assert_allclose(found, d0 + 0.7 * softmax(d0 / 0.3, axis=1) - 0.2, atol=1e-5)
    np.testing.assert_allclose((found - d0 + 0.2).sum(axis=1), 0.7, atol=1e-5)
    plain = dataclasses.replace(weight, alpha=jnp.float32(0), shift=jnp.float32(0))
    np.testing.assert_allclose(plain.matrix(plain.parts()), d0, atol=1e-5)
    start = adapt({"w": np.zeros((6, 5))})["w"]
    assert [float(getattr(start, n)) for n in ("alpha", "gamma", "shift")] == [1.0, 1.0, 0.0]


def test_the_competition_starts_at_its_own_limit():
    """At sparsity 0 all but the smallest entry stay, with their magnitude; without competition the kernel itself."""
    weight = scaled(adapt({"w": np.zeros((6, 5))})["w"])
    d, added = np.asarray(weight.matrix(weight.parts())), np.asarray(weight.addition())
    smallest = np.abs(d).argmin()
    expected = d * np.abs(d)
    expected.ravel()[smallest] = 0.0
    np.testing.assert_allclose(added, expected, rtol=1e-6)
    mixed = dataclasses.replace(weight, competes=False)
    np.testing.assert_allclose(mixed.addition(), d, rtol=1e-6)


@pytest.mark.parametrize("rule", ["hard", "soft"])
def test_as_many_entries_survive_as_a_layer_was_given(rule):
    weight = scaled(adapt({"w": np.zeros((10, 8))}, rule=rule)["w"])
    for kept in (0, 1, 37, 79, 80):
        order = snella._budget.order_of(kept, 80, rule)
        added = dataclasses.replace(weight, order=jnp.asarray(order, jnp.int32)).addition()
        assert int((np.asarray(added) != 0).sum()) == (min(kept, 79) if rule == "hard" else kept)


def test_the_budget_falls_by_the_cube_and_whole_numbers_are_whole():
    sizes, options = [600, 400], {"start": 0.1, "target": 0.8}
    found = [snella.budget(t, sizes, **options, epochs=20, warmup=3, final=4) for t in range(24)]
    for epoch, value in enumerate(found):
        share = min(max((epoch - 3) / 13, 0.0), 1.0)
        assert value == math.floor(round(200 + 700 * (1 - share) ** 3, 6))
    assert found[3] == 900
    assert found[16] == found[17] == found[23] == 200
    assert (np.diff(found) <= 0).all()
    assert snella.kept_entries(0.8, 1000) == 200  # (1 - 0.8) * 1000 is 199.99999999999994
    late = [snella.budget(t, [1000], start=0.0, target=0.8, epochs=5) for t in (4, 5)]
    assert late == [math.floor(200 + 800 / 125), 200], "without a final phase the last epoch stays above the target"


def waterfill(scores, sizes, total):
    """The shares by the equations, in exact fractions."""
    from fractions import Fraction

    scores = [Fraction(s) for s in scores]
    kept = [Fraction(0)] * len(sizes)
    for _ in range(len(sizes) + 1):
        rest = total - sum(kept)
        open_ = [i for i in range(len(sizes)) if kept[i] < sizes[i] and scores[i] > 0]
        if not rest or not open_:
            break
        part = sum(scores[i] for i in open_)
        kept = [min(Fraction(sizes[i]), k + (rest * scores[i] / part if i in open_ else 0)) for i, k in enumerate(kept)]
    return [math.floor(k) for k in kept]


def test_sharing_fills_layers_by_score():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 7))
        sizes = [int(s) for s in rng.integers(1, 60, count)]
        scores = [int(s) for s in rng.integers(0, 9, count)]
        total = int(rng.integers(0, sum(sizes) + 10))
        kept = snella.share_out(scores, sizes, total)
        if any(scores):
            assert kept == waterfill(scores, sizes, total)
        assert all(0 <= k <= s for k, s in zip(kept, sizes, strict=True))
        assert sum(kept) <= total
        room = any(k < s and (score > 0 or not any(scores)) for k, s, score in zip(kept, sizes, scores, strict=True))
        assert total - sum(kept) < count or not room
        order = rng.permutation(count)
        permuted = snella.share_out([scores[i] for i in order], [sizes[i] for i in order], total)
        assert permuted == [kept[i] for i in order]
        assert snella.share_out([1e-12 * s for s in scores], sizes, total) == kept


def test_sharing_at_its_ends():
    assert snella.share_out([2.0, 2.0], [50, 50], 30) == [15, 15]
    assert snella.share_out([1.0, 5.0], [30, 20], 60) == [30, 20]
    assert snella.share_out([0.0, 5.0], [30, 20], 60) == [0, 20]
    assert snella.share_out([0.0, 0.0], [30, 50], 40) == [20, 20]
    assert snella.share_out([1e9, 1.0], [30, 50], 20, least=4) == [16, 4]
    with pytest.raises(ValueError, match="least=20"):
        snella.share_out([1.0, 1.0], [30, 30], 30, least=20)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_importance_is_smoothed_by_the_recursion(order):
    adapted = adapt({"w": draw((4, 3))}, 2)
    trainable, _ = sj.partition(adapted)
    optimizer = snella.with_importance(optax.sgd(0.1), 0.7, 0.9, order=order)
    state, plain = optimizer.init(trainable), optax.sgd(0.1)
    value = np.asarray(trainable["w"].a, np.float64)
    smoothed, spread = np.zeros_like(value), np.zeros_like(value)
    step = jax.jit(optimizer.update)
    for number in range(4):
        gradient = jax.tree.map(lambda v, n=number: jnp.asarray(draw(v.shape, 3 + n)), trainable)
        updates, state = step(gradient, state, trainable)
        expected, _ = plain.update(gradient, plain.init(trainable), trainable)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)
        trainable = optax.apply_updates(trainable, updates)
        g = np.asarray(gradient["w"].a, np.float64)
        before, value = value, value - 0.1 * g
        seen = np.abs((value if order == "post" else before) * g)
        smoothed = 0.7 * smoothed + 0.3 * seen
        spread = 0.9 * spread + 0.1 * np.abs(seen - smoothed)
        np.testing.assert_allclose(state.importance["w.a"], smoothed, rtol=1e-4)
        np.testing.assert_allclose(state.uncertainty["w.a"], spread, rtol=1e-4)
    bad = jax.tree.map(lambda v: jnp.full(v.shape, jnp.nan), trainable)
    _, state = step(bad, state, trainable)
    np.testing.assert_allclose(state.importance["w.a"], 0.7 * smoothed, rtol=1e-4)


def test_a_constant_importance_has_a_closed_form_and_silence_raises_the_score_for_a_while():
    """I decays by itself, U towards it: the score of a layer that fell silent can win budget back."""
    adapted = adapt({"w": np.zeros((4, 3))}, 2)
    ones = jax.tree.map(jnp.ones_like, sj.partition(adapted)[0])
    optimizer = snella.with_importance(optax.set_to_zero(), 0.85, 0.85)
    state, scores, step = optimizer.init(ones), [], jax.jit(optimizer.update)
    for number in range(63):
        _, state = step(ones if number < 60 else jax.tree.map(jnp.zeros_like, ones), state, ones)
        found = state.importance["w.a"].ravel()[0], state.uncertainty["w.a"].ravel()[0]
        if number < 60:
            assert float(found[0]) == pytest.approx(1 - 0.85 ** (number + 1), rel=1e-3)
        scores.append(float(found[0] * found[1]))
    assert scores[62] > 100 * scores[59]


def network(p, x):
    for name in "abc":
        x = jnp.tanh(x @ p[name])
    return x


def test_a_run_moves_the_budget_to_the_layer_that_has_to_change_and_compiles_once():
    rng = np.random.default_rng(1)
    params = {n: rng.normal(size=(12, 12)).astype(np.float32) / np.sqrt(12) for n in "abc"}
    change = np.where(rng.random((12, 12)) < 0.3, 0.5 * rng.normal(size=(12, 12)), 0.0)
    x = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
    target = network({**params, "b": params["b"] + change}, x)
    adapted, epochs = adapt(params, 8), 12
    run = sj.with_adapters(network)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), snella.with_importance(optax.adam(1e-2)))
    trainable, frozen = sj.partition(adapted)
    state, traces = optimizer.init(trainable), []

    @jax.jit
    def epoch_of(trainable, frozen, state):
        traces.append(None)

        def step(carry, _):
            trainable, state = carry
            loss = lambda t: jnp.mean((run(sj.combine(t, frozen), x) - target) ** 2)
            value, g = jax.value_and_grad(loss)(trainable)
            updates, state = optimizer.update(g, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        (trainable, state), losses = jax.lax.scan(step, (trainable, state), None, length=20)
        return trainable, state, losses[-1]

    losses = []
    for epoch in range(epochs + 1):
        schedule = {"start": 0.0, "target": 0.8, "epochs": epochs}
        tree = snella.reallocate(sj.combine(trainable, frozen), state, epoch, **schedule)
        trainable, frozen = sj.partition(tree)
        kept = {n: 144 - int(tree[n].order) for n in "abc"}
        total = snella.budget(epoch, [144] * 3, **schedule)
        assert total - 6 <= sum(kept.values()) <= total
        trainable, state, loss = epoch_of(trainable, frozen, state)
        losses.append(float(loss))
    assert len(traces) == 1
    assert kept["b"] == max(kept.values())
    assert losses[-1] < losses[0]
    merged = sj.merge(sj.combine(trainable, frozen))
    np.testing.assert_allclose(network(merged, x), run(sj.combine(trainable, frozen), x), rtol=1e-4, atol=1e-5)
    done = snella.reallocate(tree, state, epochs + 1, start=0.0, target=0.5, epochs=epochs)
    assert done is tree


def test_a_silenced_layer_adds_nothing_and_gets_no_gradient():
    weight = adapt({"w": draw((5, 4))}, sparsity=1.0)["w"]
    np.testing.assert_array_equal(weight.materialize(), draw((5, 4)))
    trainable, frozen = sj.partition({"w": weight})
    run = sj.with_adapters(lambda p: jnp.sum(jnp.ones((2, 5)) @ p["w"]))
    found = jax.jit(jax.grad(lambda t: run(sj.combine(t, frozen))))(trainable)
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(found))


def test_layers_of_a_stack_have_scores_and_budgets_of_their_own():
    role = {"w": sj.Role.dense((1,), (2,), (0,))}
    adapted = sj.adapt({"w": jnp.zeros((3, 6, 5))}, {"w": snella.snella(4)}, key=jax.random.key(0), roles=role)
    trainable, _ = sj.partition(adapted)
    optimizer = snella.with_importance(optax.set_to_zero())
    weights = jnp.asarray([0.0, 1.0, 2.0])[:, None, None, None]
    gradient = jax.tree.map(jnp.zeros_like, trainable)
    gradient["w"] = dataclasses.replace(gradient["w"], a=jnp.ones_like(trainable["w"].a) * weights)
    _, state = optimizer.update(gradient, optimizer.init(trainable), trainable)
    state = {"inside": (state, None)}
    orders = np.asarray(snella.reallocate(adapted, state, 5, start=0.0, target=0.5, epochs=5)["w"].order)
    seen = np.abs(np.asarray(trainable["w"].a, np.float64)) * np.asarray(weights)
    scores = (0.15 * seen * 0.15 * 0.85 * seen).mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(orders, [max(30 - k, 1) for k in snella.share_out(scores, [30] * 3, 45)])


def test_an_nnx_model_learns():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    graph, rest = nnx.split(model)
    x, y = jnp.asarray(draw((16, 6))), jnp.asarray(draw((16, 5), 1))
    method = snella.snella(4, sparsity=0.2, dropout=0.0, drop_path=0.0)
    adapted = sj.adapt(nnx.to_pure_dict(rest), {"kernel": method}, key=jax.random.key(0))

    def forward(p):
        nnx.replace_by_pure_dict(rest, p)
        return nnx.merge(graph, rest)(x)

    loss = lambda t, _: jnp.mean((sj.with_adapters(forward)(t) - y) ** 2)
    end = jax.jit(lambda t: sj.training.scan_steps(loss, optax.adam(3e-2), t, steps=80))(adapted)
    assert end.losses[-1] < 0.9 * end.losses[0]


def test_bad_input_is_refused():
    for name, value in {"sparsity": -0.1, "rule": "x", "dropout": 1.0, "dtype": jnp.float16}.items():
        with pytest.raises(ValueError, match=name):
            snella.snella(4, **{name: value})
    with pytest.raises(RankError, match="rank=3: expected an even number"):
        snella.snella(3)
    with pytest.raises(ValueError, match="leave nothing of epochs=10"):
        snella.budget(1, [5], start=0.0, target=0.5, epochs=10, warmup=5, final=5)
    for options in ({"order": "mid"}, {"metric": "x"}, {"b1": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            snella.with_importance(optax.sgd(0.1), **options)
    adapted = adapt({"w": draw((4, 3))})
    with pytest.raises(StructureError, match="0 states of with_importance"):
        snella.reallocate(adapted, (), 1, start=0.0, target=0.5)
    with pytest.raises(StructureError, match="no weight of snella"):
        snella.reallocate({"w": jnp.ones(3)}, (), 1, start=0.0, target=0.5)
