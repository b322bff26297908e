"""MoSA against explicit copies of its parts, and against a plain adapter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import erf, rel_entr

import subspace_jax as sj
from subspace_jax.core import RankError
from tests.tolerances import tolerance

mosa = sj.methods.mosa
N = 4
X = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "fc": {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), "bias": jnp.asarray(rng.normal(size=6))}
    }


def network(p, x):
    return x @ p["fc"]["kernel"] + p["fc"]["bias"]


run = sj.with_adapters(network)


def adapt(size=3, seed=0, **options):
    method = mosa.mosa(size, **{"parts": N, "dropout": 0.0, **options})
    return sj.adapt(params(), {"fc/*": method}, key=jax.random.key(seed))


def moved(adapted, seed=5):
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen)


def of(adapted):
    return adapted["fc"]["kernel"]


def keys_of_parts(adapted, count=200):
    """A training tree for every drawn pair of parts."""
    found = {}
    for seed in range(count):
        tree = sj.with_dropout(adapted, jax.random.key(seed))
        found.setdefault(tuple(int(e) for e in of(tree).drawn()), tree)
    return found


@pytest.mark.parametrize("split", ["entries", "rows", "columns"])
def test_every_entry_has_one_owner_and_parts_are_of_one_size(split):
    adapted = adapt(5, share="none", split=split)
    for name, shape in (("down", (6, 5)), ("up", (5, 6))):
        owner = np.asarray(getattr(of(adapted), f"{name}_owner"))
        assert owner.shape == shape
        assert owner.dtype == np.int8
        lines = {"entries": owner.ravel(), "rows": owner[:, 0], "columns": owner[0]}[split]
        if split == "rows":
            assert (owner == owner[:, :1]).all()
        if split == "columns":
            assert (owner == owner[:1]).all()
        sizes = np.bincount(lines, minlength=N)
        assert sizes.max() - sizes.min() <= 1
        assert len(sizes) == N


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_every_part_starts_at_the_frozen_layer(share):
    adapted = adapt(share=share)
    for tree in (adapted, *list(keys_of_parts(adapted, 12).values())):
        np.testing.assert_array_equal(run(tree, X), network(params(), X))


def by_hand(weight, x, down_part=None, up_part=None, activation=lambda v: 0.5 * v * (1 + erf(v / np.sqrt(2)))):
    """The layer with copies of the parts, one chosen or all averaged, in float64."""
    wide = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    wide = {n: np.asarray(v, np.float64) for n, v in wide.items() if isinstance(v, jax.Array) and v.dtype != jnp.int8}

    def copies(name, owner, start):
        if owner is None:
            return [wide[name]]
        return [np.where(np.asarray(owner) == e, wide[name], start) for e in range(weight.parts)]

    downs = copies("down", weight.down_owner, wide.get("down_start"))
    ups = copies("up", weight.up_owner, 0.0)
    pick = lambda all_, part: np.mean(all_, axis=0) if part is None or len(all_) == 1 else all_[part]
    y = x.astype(np.float64) @ wide["base"] + np.asarray(params()["fc"]["bias"], np.float64)
    h = y
    if "norm_scale" in wide:
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        h = h * wide["norm_scale"] + wide["norm_bias"]
    few = activation(h @ pick(downs, down_part) + pick(wide["down_bias"], down_part))
    return y + float(weight.scale) * (few @ pick(ups, up_part) + pick(wide["up_bias"], up_part))


@pytest.mark.parametrize(("share", "norm"), [("down", True), ("up", False), ("none", True)])
def test_a_pass_is_one_copy_and_without_a_key_it_is_their_mean(share, norm):
    adapted = moved(adapt(share=share, norm=norm, scale=0.1))
    np.testing.assert_allclose(run(adapted, X), by_hand(of(adapted), X), rtol=1e-4, atol=1e-4)
    seen = keys_of_parts(adapted, 40)
    assert len(seen) > 8
    for (down, up), tree in list(seen.items())[:6]:
        np.testing.assert_allclose(run(tree, X), by_hand(of(adapted), X, down, up), rtol=1e-4, atol=1e-4)


def test_merged_is_the_mean_of_the_passes_over_the_draw_and_a_plain_adapter():
    adapted = moved(adapt())
    parts = {}
    for (_, up), tree in keys_of_parts(adapted, 60).items():
        parts.setdefault(up, np.asarray(run(tree, X), np.float64))
    assert len(parts) == N
    merged = mosa.merge_parts(adapted)
    np.testing.assert_allclose(run(merged, X), np.mean(list(parts.values()), axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(merged, X), run(adapted, X), rtol=tolerance(), atol=20 * tolerance())
    plain = sj.adapt(params(), {"fc/*": sj.bottleneck(3, activation="gelu")}, key=jax.random.key(0))
    counts = [sj.summary(tree).trainable for tree in (adapted, merged, plain)]
    norm = 2 * 6
    assert counts == [norm + 6 * 3 + 3 + 3 * 6 + N * 6, norm + 6 * 3 + 3 + 3 * 6 + 6, 6 * 3 + 3 + 3 * 6 + 6]
    bare = mosa.merge_parts(moved(adapt(norm=False)))
    flops = [jax.jit(run).lower(tree, X).compile().cost_analysis()["flops"] for tree in (bare, plain)]
    assert flops[0] <= 1.02 * flops[1]


def test_published_count_at_inference():
    """ViT-B/16, 12 blocks, b = 64."""
    leaf = {"kernel": jax.ShapeDtypeStruct((3072, 768), jnp.float32), "bias": jax.ShapeDtypeStruct((768,), jnp.float32)}
    make = lambda p: sj.adapt(p, {"fc/*": mosa.mosa(64)}, key=jax.random.key(0))
    tree = jax.eval_shape(lambda p: mosa.merge_parts(make(p)), {"fc": leaf})
    assert 12 * sum(v.size for v in jax.tree.leaves(sj.partition(tree)[0])) == 1_208_064


def test_one_part_is_a_plain_adapter():
    """The same outputs and gradients, with and without a key, and merging changes nothing."""
    adapted = moved(adapt(parts=1, norm=False))
    plain = sj.adapt(params(), {"fc/*": sj.bottleneck(3, activation="gelu")}, key=jax.random.key(0))
    shared = {n: getattr(of(adapted), n) for n in ("down", "up")}
    shared |= {n: getattr(of(adapted), n)[0] for n in ("down_bias", "up_bias")}
    plain["fc"]["kernel"] = dataclasses.replace(plain["fc"]["kernel"], **shared)
    value = lambda t, x, fixed: jnp.sum(jnp.sin(run(sj.combine(t, fixed), x)))
    gradient = jax.jit(jax.value_and_grad(value))
    for tree in (adapted, sj.with_dropout(adapted, jax.random.key(1)), mosa.merge_parts(adapted)):
        (a, ga), (b, gb) = (gradient(t, X, f) for t, f in (sj.partition(tree), sj.partition(plain)))
        assert float(a) == pytest.approx(float(b), rel=1e-4)
        for name in ("down", "up"):
            ours, theirs = (getattr(g["fc"]["kernel"], name) for g in (ga, gb))
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_moves_only_the_entries_of_the_two_drawn_parts():
    adapted = moved(adapt(share="none"))
    trainable, frozen = sj.partition(adapted)
    keys = jax.random.split(jax.random.key(3))
    draws = [of(sj.with_dropout(adapted, key)).drawn() for key in keys]
    loss = lambda z: jnp.mean((z - 1.0) ** 2)
    logits = lambda tree: run(tree, X)
    value = lambda t: mosa.two_pass_loss(logits, sj.combine(t, frozen), loss, jax.random.key(3), add=0.5)
    found = of(jax.jit(jax.grad(lambda t: value(t).loss))(trainable))
    for i, name in enumerate(("down", "up")):
        owner, drawn = np.asarray(getattr(of(adapted), f"{name}_owner")), {int(d[i]) for d in draws}
        moves = np.asarray(getattr(found, name)) != 0
        assert moves.any()
        assert not moves[~np.isin(owner, list(drawn))].any()
        if name == "up":  # a hidden feature that no drawn entry reads has no gradient at all
            np.testing.assert_array_equal(moves, np.isin(owner, list(drawn)))
        biases = np.asarray(getattr(found, f"{name}_bias"))
        assert set(np.flatnonzero(biases.any(axis=-1))) == drawn


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.adam(0.02)], ids=["sgd", "adam"])
def test_one_array_is_n_copies_with_masked_gradients(optimizer):
    """The release's layout, written out: 20 steps, zero gradients for the copies that are not drawn."""
    adapted = adapt(norm=False, activation="relu")
    weight = of(adapted)
    owner = [np.asarray(weight.up_owner) == e for e in range(N)]
    target = np.random.default_rng(8).normal(size=(5, 6)).astype(np.float32)
    copies = {"down": weight.down, "down_bias": weight.down_bias[0], "ups": [weight.up] * N}
    copies |= {"biases": list(weight.up_bias)}

    def explicit(copies, part):
        y = network(params(), X)
        few = jax.nn.relu(y @ copies["down"] + copies["down_bias"])
        up = sum(jnp.where(part == e, copies["ups"][e] * owner[e], 0.0) for e in range(N))
        bias = sum(jnp.where(part == e, copies["biases"][e], 0.0) for e in range(N))
        return jnp.mean((y + few @ up + bias - target) ** 2)

    trainable, frozen = sj.partition(adapted)

    @jax.jit
    def step(trainable, state, copies, other, key):
        train = lambda t: jnp.mean((run(sj.with_dropout(sj.combine(t, frozen), key), X) - target) ** 2)
        part = of(sj.with_dropout(sj.combine(trainable, frozen), key)).drawn()[1]
        updates, state = optimizer.update(jax.grad(train)(trainable), state, trainable)
        changes, other = optimizer.update(jax.grad(explicit)(copies, part), other, copies)
        return optax.apply_updates(trainable, updates), state, optax.apply_updates(copies, changes), other

    state, other = optimizer.init(trainable), optimizer.init(copies)
    for number in range(20):
        trainable, state, copies, other = step(trainable, state, copies, other, jax.random.key(number))
    found = of(trainable)
    joined = sum(np.where(owner[e], copies["ups"][e], 0.0) for e in range(N))
    np.testing.assert_allclose(found.up, joined, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.down, copies["down"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.up_bias, np.stack(copies["biases"]), rtol=1e-3, atol=1e-5)


def test_consistency_is_the_mean_of_both_divergences():
    rng = np.random.default_rng(2)
    z1, z2 = rng.normal(size=(2, 7, 4))
    p1, p2 = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (z1, z2))
    expected = 0.5 * (rel_entr(p2, p1).sum(-1).mean() + rel_entr(p1, p2).sum(-1).mean())
    value = lambda a, b: float(mosa.consistency(jnp.asarray(a), jnp.asarray(b)))
    assert value(z1, z2) == pytest.approx(expected, rel=1e-5)
    assert value(z1, z2) == pytest.approx(value(z2, z1), rel=1e-6)
    assert value(z1, z1 + 3.0) == pytest.approx(0.0, abs=1e-6)
    gradient = np.asarray(jax.jit(jax.grad(lambda a: mosa.consistency(a, jnp.asarray(z2))))(jnp.asarray(z1)))
    fixed = lambda a: 0.5 * (p2 * (np.log(p2) - a + np.log(np.exp(a).sum(-1, keepdims=True)))).sum(-1).mean()
    along = rng.normal(size=z1.shape)
    central = (fixed(z1 + 1e-5 * along) - fixed(z1 - 1e-5 * along)) / 2e-5
    assert (gradient * along).sum() == pytest.approx(central, rel=1e-3)


def test_the_loss_adds_what_it_says_and_its_passes_differ():
    adapted, key = moved(adapt()), jax.random.key(4)
    logits, task = lambda tree: run(tree, X), lambda z: jnp.mean(z**2)
    first, second = (run(sj.with_dropout(adapted, k), X) for k in jax.random.split(key))
    assert (np.asarray(first) != np.asarray(second)).any()
    apart = mosa.consistency(first, second)
    for add, reg in ((0.0, 1.0), (0.5, 0.0), (2.0, 3.0)):
        found = mosa.two_pass_loss(logits, adapted, task, key, add=add, reg=reg)
        assert float(found.loss) == pytest.approx(float(task(first) + add * task(second) + reg * apart), rel=1e-5)


def test_layers_of_a_stack_draw_for_themselves_and_dropout_is_on_hidden_features():
    role = {"w": sj.Role.dense((1,), (2,), (0,))}
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4)), jnp.float32)}
    method = mosa.mosa(2, bias=False, dropout=0.0)
    adapted = sj.with_dropout(sj.adapt(tree, {"w": method}, key=jax.random.key(0), roles=role), jax.random.key(1))
    weight = adapted["w"]
    assert weight.dropout_key.shape == (6,)
    owners = np.asarray(weight.up_owner)
    assert any((owners[0] != owners[i]).any() for i in range(1, 6))
    dropped = moved(adapt(dropout=0.5, parts=1))
    outputs = [run(sj.with_dropout(dropped, jax.random.key(s)), X) for s in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (np.asarray(outputs[0]) != np.asarray(outputs[2])).any()


def test_an_nnx_model_trains():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    arrays = nnx.to_pure_dict(state)
    adapted = sj.adapt(arrays, {"{kernel,bias}": mosa.mosa(3, dropout=0.0)}, key=jax.random.key(0))

    def forward(p):
        nnx.replace_by_pure_dict(state, p)
        return nnx.merge(graph, state)(X)

    logits, labels = sj.with_adapters(forward), jnp.arange(5) % 6
    task = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
    loss = lambda tree, key: mosa.two_pass_loss(logits, tree, task, key).loss
    keys = jax.random.split(jax.random.key(0), 60)
    end = jax.jit(lambda t: sj.training.scan_steps(loss, optax.adam(3e-2), t, keys))(adapted)
    assert float(task(logits(end.adapted))) < 0.6 * float(task(logits(adapted)))


def test_bad_options_are_refused_by_name():
    for options in ({"share": "both"}, {"split": "x"}, {"dropout": 1.0}, {"activation": "swish"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            mosa.mosa(4, **options)
    for parts in (0, 128):
        with pytest.raises(RankError, match=f"mosa: parts={parts}"):
            mosa.mosa(4, parts=parts)
    with pytest.raises(ValueError, match="reg=-1"):
        mosa.two_pass_loss(lambda t: X, params(), lambda z: 0.0, jax.random.key(0), reg=-1)
