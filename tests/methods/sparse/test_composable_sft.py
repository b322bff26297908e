"""Composable sparse fine-tuning against numpy: what is chosen, the two phases, sums of vectors, and their coding."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import sparse

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError

sft = sj.methods.composable_sft
KEY = jax.random.key(0)
MASKABLE = ("*/kernel", "*/bias")


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params(seed=0):
    shapes = {"one": {"kernel": (6, 5), "bias": (5,)}, "two": {"kernel": (5, 4), "bias": (4,)}, "norm": {"scale": (6,)}}
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda v: isinstance(v, tuple))
    return jax.tree.unflatten(treedef, [jnp.asarray(draw(s, seed + i)) for i, s in enumerate(leaves)])


def masks(selection):
    return np.concatenate([np.ravel(m) for m in selection.chosen.values()])


def test_chooses_the_largest_changes_of_all_arrays_together():
    before, after = params(), params(50)
    after["two"]["kernel"] = after["two"]["kernel"] * 5  # of another scale
    for count in (0, 1, 17, 44):
        found = sft.select_changed(before, after, count, maskable=MASKABLE)
        changes = {
            p: np.abs(np.asarray(dict(sj.core.leaves_with_paths(after))[p] - v))
            for p, v in sj.core.leaves_with_paths(before)
            if p in found.chosen
        }
        assert "norm/scale" not in found.chosen
        flat = np.concatenate([c.ravel() for c in changes.values()])
        chosen = masks(found)
        assert chosen.sum() == found.count == count
        if 0 < count < 44:
            assert flat[chosen].min() >= flat[~chosen].max()
    per_leaf = {p: set(np.argsort(-c.ravel())[: round(17 * c.size / 44)]) for p, c in changes.items()}
    found = sft.select_changed(before, after, 17, maskable=MASKABLE)
    assert any(set(np.flatnonzero(found.chosen[p])) != per_leaf[p] for p in per_leaf)


def test_ties_are_cut_off_exactly_and_counted():
    before = {"a": jnp.zeros(4), "b": jnp.zeros(3)}
    after = {"a": jnp.array([1.0, 0.0, 1.0, 2.0]), "b": jnp.array([1.0, 1.0, 0.0])}
    found = sft.select_changed(before, after, 3)
    assert [m.tolist() for m in found.chosen.values()] == [[True, False, True, True], [False] * 3]
    assert found.ties == 2
    still = sft.select_changed(before, before, 2)  # nothing moved: still exactly so many
    assert still.count == 2


def test_further_rounds_choose_among_what_is_left():
    before, after = params(), params(9)
    first = sft.select_changed(before, after, 10, maskable=MASKABLE)
    both = sft.select_changed(before, after, 7, maskable=MASKABLE, already=first)
    whole = sft.select_changed(before, after, 17, maskable=MASKABLE)
    assert (masks(both) >= masks(first)).all()
    np.testing.assert_array_equal(masks(both), masks(whole))


def quadratic(goal, curvature):
    def loss(tree, _):
        arrays = sj.merge(tree)
        return sum(jnp.sum(curvature[n] * (arrays[n] - goal[n]) ** 2) for n in goal) / 2

    return loss


def test_on_a_quadratic_the_ticket_is_the_top_of_the_distance_and_ends_at_the_goal():
    start = {"a": jnp.asarray(draw((4, 3))), "b": jnp.asarray(draw((5,), 1))}
    goal = {"a": draw((4, 3), 2), "b": draw((5,), 3)}
    curvature = {"a": np.abs(draw((4, 3), 4)) + 0.5, "b": np.abs(draw((5,), 5)) + 0.5}
    loss, seen = quadratic(goal, curvature), []

    def train(tree, phase):
        seen.append((phase, sj.merge(tree)))
        return jax.jit(lambda t: sj.training.scan_steps(loss, optax.sgd(0.3), t, steps=200))(tree).adapted

    found = sft.lottery_ticket(start, train, 6, maskable=("a", "b"), key=KEY)
    apart = np.concatenate([np.abs(goal[n] - np.asarray(start[n])).ravel() for n in "ab"])
    assert set(np.flatnonzero(masks(found.selection))) == set(np.argsort(-apart)[:6])
    merged = sj.merge(found.adapted)
    for name, mask in found.selection.chosen.items():
        np.testing.assert_allclose(np.asarray(merged[name])[mask], goal[name][mask], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(merged[name])[~mask], np.asarray(start[name])[~mask])
    assert [phase for phase, _ in seen] == ["full", "sparse"]
    jax.tree.map(np.testing.assert_array_equal, seen[1][1], start)  # gone back exactly
    several = sft.lottery_ticket(start, train, 6, maskable=("a", "b"), rounds=3, key=KEY)
    assert several.selection.count == 6
    assert [phase for phase, _ in seen[2:]] == ["full", "sparse"] * 3
    for name, mask in several.selection.chosen.items():
        assert (np.asarray(sj.merge(several.adapted)[name])[~mask] == np.asarray(start[name])[~mask]).all()


def network(p, x):
    h = jnp.tanh((x * p["norm"]["scale"]) @ p["one"]["kernel"] + p["one"]["bias"])
    return h @ p["two"]["kernel"] + p["two"]["bias"]


X, Y = jnp.asarray(draw((16, 6), 7)), jnp.asarray(draw((16, 4), 8))


def mse(tree, _):
    return jnp.mean((sj.with_adapters(network)(tree, X) - Y) ** 2)


def fit(tree, phase, steps=40):
    del phase
    return jax.jit(lambda t: sj.training.scan_steps(mse, optax.adam(1e-2), t, steps=steps))(tree).adapted


@pytest.mark.parametrize("count", [0, 7, 30])
def test_the_head_goes_back_too_and_what_is_not_chosen_stays_bit_for_bit(count):
    starts = []

    def train(tree, phase):
        starts.append((phase, sj.merge(tree)))
        return fit(tree, phase)

    start = params()
    found = sft.lottery_ticket(start, train, count, maskable="*/kernel", head="two/*", key=KEY)
    jax.tree.map(np.testing.assert_array_equal, starts[1][1], start)
    merged = sj.merge(found.adapted)
    assert found.selection.paths == ("one/kernel",)
    np.testing.assert_array_equal(merged["norm"]["scale"], start["norm"]["scale"])
    assert (np.asarray(merged["two"]["kernel"]) != np.asarray(start["two"]["kernel"])).any()
    mask = found.selection.chosen["one/kernel"]
    moved = np.asarray(merged["one"]["kernel"]) != np.asarray(start["one"]["kernel"])
    assert not moved[~mask].any()
    assert moved[mask].all()


def test_all_entries_are_dense_fine_tuning_and_the_state_has_as_many_as_were_chosen():
    start = params()
    selection = (
        sft.select_changed(start, params(5), 50, maskable=("one/*", "two/kernel"), already=None) if False else None
    )
    assert selection is None
    every = sft.select_changed(start, params(5), 55, maskable=("one/*", "two/kernel"))
    sparse_tree = fit(sj.adapt(start, {every.paths: sft.composable_sft(every)}, key=KEY), "sparse")
    dense_tree = fit(sj.adapt(start, {every.paths: sj.full()}, key=KEY), "full")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sj.merge(sparse_tree), sj.merge(dense_tree)
    )
    few = sft.select_changed(start, params(5), 9, maskable=MASKABLE)
    trainable, _ = sj.partition(sj.adapt(start, {few.paths: sft.composable_sft(few)}, key=KEY))
    assert sum(v.size for v in jax.tree.leaves(trainable)) == 9
    assert sum(v.size for v in jax.tree.leaves(optax.adam(1e-3).init(trainable))) == 2 * 9 + 1


def test_the_masked_gradient_of_dense_adam_gives_the_same():
    start, few = params(), sft.select_changed(params(), params(5), 9, maskable=MASKABLE)
    ours = sj.merge(fit(sj.adapt(start, {few.paths: sft.composable_sft(few)}, key=KEY), "sparse", steps=10))
    optimizer, arrays = optax.adam(1e-2), start
    state = optimizer.init(arrays)
    mask = sj.core.map_with_paths(lambda p, v: few.chosen.get(p, np.zeros(v.shape, bool)), start)
    slope = jax.jit(jax.grad(lambda p: jnp.mean((network(p, X) - Y) ** 2)))
    for _ in range(10):
        g = slope(arrays)
        updates, state = optimizer.update(jax.tree.map(lambda g, m: g * m, g, mask), state)
        arrays = optax.apply_updates(arrays, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, arrays)


def vector(seed, count=9, shape=(6, 5), dyadic=False):
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(int(np.prod(shape)), count, replace=False))
    values = rng.integers(-64, 64, count) / 32 if dyadic else rng.normal(size=count)
    return sft.Vector({"one/kernel": (at, values.astype(np.float32))}, {"one/kernel": shape})


def dense(v, shape=(6, 5)):
    at, values = v.entries["one/kernel"]
    return sparse.coo_array((values, (at // shape[1], at % shape[1])), shape).toarray()


def test_vectors_add_up_commute_and_can_be_taken_away():
    base = params()
    base["one"]["kernel"] = jnp.asarray(np.round(np.asarray(base["one"]["kernel"]) * 64) / 64)
    a, b, c = (vector(i, dyadic=True) for i in range(3))
    expected = np.asarray(base["one"]["kernel"]) + dense(a) + dense(b) + dense(c)
    for order in ((a, b, c), (c, a, b)):
        np.testing.assert_array_equal(sft.compose(base, *order)["one"]["kernel"], expected)
    step_by_step = sft.compose(sft.compose(sft.compose(base, a), b), c)
    np.testing.assert_array_equal(step_by_step["one"]["kernel"], expected)
    back = sft.compose(sft.compose(base, a, b), -a, -b)
    jax.tree.map(np.testing.assert_array_equal, back, base)
    jax.tree.map(np.testing.assert_array_equal, sft.compose(base), base)
    touched = np.asarray(sft.compose(base, a, b)["one"]["kernel"]) != np.asarray(base["one"]["kernel"])
    assert not touched[(dense(a) == 0) & (dense(b) == 0)].any()
    rough = sft.compose(sft.compose(params(), vector(1)), -vector(1))["one"]["kernel"]
    size = np.maximum(np.abs(np.asarray(params()["one"]["kernel"])), np.abs(dense(vector(1))))
    assert (
        np.abs(np.asarray(rough) - np.asarray(params()["one"]["kernel"])) <= np.spacing(size.astype(np.float32))
    ).all()


def test_a_vector_of_a_trained_tree_gives_the_tree_and_its_head_and_passes_through_a_file(tmp_path):
    start = params()
    found = sft.lottery_ticket(start, fit, 12, maskable="one/*", head="two/*", key=KEY)
    task = sft.vector_of(found.adapted)
    assert task.count <= 12
    assert set(task.head) == {"two/kernel", "two/bias"}
    composed = sft.compose(start, task)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), composed, sj.merge(found.adapted))
    language = vector(4)
    both = sft.compose(start, task, language)
    np.testing.assert_array_equal(both["two"]["kernel"], composed["two"]["kernel"])
    sj.save_adapter(tmp_path / "task.safetensors", found.adapted)
    again = sft.vector_of(sj.load_adapter(tmp_path / "task.safetensors", start))
    jax.tree.map(np.testing.assert_array_equal, sft.compose(start, again), composed)
    assert (tmp_path / "task.safetensors").stat().st_size < 16_000


def test_transposed_and_stacked_arrays_have_their_entries_in_their_own_order():
    array = jnp.asarray(draw((3, 4, 2)))
    mask = np.random.default_rng(1).random((3, 4, 2)) < 0.4
    for role in (sj.Role.dense((2,), (1,), (0,)), sj.Role.dense((1,), (0, 2))):
        tree = sj.adapt({"w": array}, {"w": sft.composable_sft(sft.Selection({"w": mask}))}, key=KEY, roles={"w": role})
        trainable, frozen = sj.partition(tree)
        moved = sj.combine(jax.tree.map(lambda v: v + 1.0, trainable), frozen)
        np.testing.assert_allclose(np.asarray(sj.merge(moved)["w"] - array), mask, atol=1e-6)
        np.testing.assert_array_equal(sft.vector_of(moved).entries["w"][0], np.flatnonzero(mask))


def test_gaps_are_a_bijection():
    rng = np.random.default_rng(0)
    cases = [np.arange(0), np.arange(50), np.array([2**40, 2**40 + 1, 2**55])]
    cases += [np.sort(rng.choice(10**6, count, replace=False)) for count in (1, 100, 20_000)]
    for positions in cases:
        coded = sft.encode_gaps(positions)
        assert coded.dtype == np.uint8
        np.testing.assert_array_equal(sft.decode_gaps(coded), positions)
    assert sft.encode_gaps(cases[-1]).size < 1.4 * 20_000
    with pytest.raises(ValueError, match="must ascend"):
        sft.encode_gaps(np.array([3, 3]))
    with pytest.raises(ValueError, match="cut off"):
        sft.decode_gaps(np.array([200], np.uint8))


def test_the_distance_is_its_sum_and_has_no_gradient_at_the_start():
    start, few = params(), sft.select_changed(params(), params(5), 9, maskable="one/*")
    tree = sj.adapt(start, {"two/bias": sj.full(), few.paths: sft.composable_sft(few)}, key=KEY)
    trainable, frozen = sj.partition(tree)
    value = lambda t: sft.distance(sj.combine(t, frozen), 100, start)
    assert float(value(trainable)) == 0.0
    slope = jax.jit(jax.grad(value))
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(slope(trainable)))
    moved = jax.tree.map(lambda v: v + jnp.asarray(draw(v.shape, 3)), trainable)
    total = sum(np.abs(draw(v.shape, 3)).sum() for v in jax.tree.leaves(trainable))
    assert float(value(moved)) == pytest.approx(total / 100, rel=1e-5)
    signs = jax.tree.map(lambda v: np.sign(draw(v.shape, 3)) / 100, trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), slope(moved), signs)


def test_random_choice_is_of_all_arrays_and_of_its_key():
    one, same, other = (sft.select_random(params(), 20, key=jax.random.key(s), maskable=MASKABLE) for s in (0, 0, 1))
    np.testing.assert_array_equal(masks(one), masks(same))
    assert (masks(one) != masks(other)).any()
    assert one.count == 20


def test_a_linen_model_learns():
    model = nn.Dense(4)
    p = model.init(KEY, X)["params"]
    apply = sj.with_adapters(lambda p, x: model.apply({"params": p}, x))
    loss = lambda tree, _: jnp.mean((apply(tree, X) - Y) ** 2)
    train = lambda tree, phase: sj.training.scan_steps(loss, optax.adam(3e-2), tree, steps=60).adapted
    found = sft.lottery_ticket(p, train, 10, maskable="kernel", key=KEY)
    assert float(loss(found.adapted, None)) < 0.95 * float(loss(p, None))


def test_bad_input_is_refused_by_path():
    before = params()
    with pytest.raises(RankError, match="count=99: 59 entries are left to choose from"):
        sft.select_changed(before, params(5), 99, maskable=MASKABLE)
    with pytest.raises(PatternError, match="maskable='three/kernel' matches no array"):
        sft.select_changed(before, params(5), 3, maskable="three/kernel")
    with pytest.raises(StructureError, match="one/kernel: select_changed: of shape"):
        sft.select_changed(
            before, {**params(), "one": {"kernel": jnp.ones(3), "bias": jnp.ones(5)}}, 3, maskable="one/*"
        )
    chosen = sft.select_changed(before, params(5), 3, maskable="one/kernel")
    with pytest.raises(PatternError, match="two/kernel: composable_sft: is not in the selection"):
        sj.adapt(before, {"*/kernel": sft.composable_sft(chosen)}, key=KEY)
    with pytest.raises(StructureError, match="one/kernel: composable_sft: has shape"):
        sj.adapt({"one": {"kernel": jnp.ones((2, 2))}}, {"**": sft.composable_sft(chosen)}, key=KEY)
    with pytest.raises(StructureError, match="one/kernel: compose: the vector is of an array"):
        sft.compose({"one": {"kernel": jnp.ones((2, 2))}}, vector(1))
    with pytest.raises(StructureError, match="no additions"):
        sft.vector_of(before)
    with pytest.raises(RankError, match="rounds=0"):
        sft.lottery_ticket(before, fit, 3, maskable="**", rounds=0, key=KEY)
