"""LoRA-Squeeze against full decompositions in float64: what is kept, what is lost, and training in stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import subspace_angles

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError
from subspace_jax.methods.low_rank.lora_squeeze import (
    Stage,
    recommend_rank,
    retained,
    spectrum,
    squeeze,
    squeeze_state,
    stages,
    train_in_stages,
)
from tests.tolerances import assert_rounding, tolerance

KEY = jax.random.key(0)
RANK, INPUTS, OUTPUTS = 6, 12, 9


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lora(a, b, method=None, roles=None, **options):
    """A LoRA of given factors."""
    shape = (*a.shape[:-1], b.shape[-1])
    method = method or sj.lora(a.shape[-1], alpha=3.0, **options)
    fresh = sj.adapt({"w": jnp.zeros(shape)}, {"w": method}, key=KEY, roles=roles)["w"]
    return {"w": dataclasses.replace(fresh, a=jnp.asarray(a), b=jnp.asarray(b))}


def planted(values, seed=0, inputs=INPUTS, outputs=OUTPUTS):
    """Factors of a product with given singular values, in a gauge of no meaning."""
    rng = np.random.default_rng(seed)
    r = len(values)
    u, v = (np.linalg.qr(rng.normal(size=(n, r)))[0] for n in (inputs, outputs))
    gauge = rng.normal(size=(r, r)) + 2 * np.eye(r)
    b = np.linalg.inv(gauge) @ (np.asarray(values)[:, None] * v.T)
    return (u @ gauge).astype(np.float32), b.astype(np.float32)


def update(adapted):
    w = adapted["w"]
    return float(w.scale) * (np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64))


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], s


VALUES = (4.0, 3.0, 2.0, 1.0, 0.5, 0.1)


@pytest.mark.parametrize("algorithm", ["factored", "dense"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_the_best_approximation_of_its_rank(algorithm, rank):
    adapted = lora(*planted(VALUES))
    small = squeeze(adapted, rank, algorithm=algorithm, key=KEY)
    full = update(adapted)
    expected, s = best(full, rank)
    np.testing.assert_allclose(update(small), expected, atol=2e-5)
    assert small["w"].a.shape, small["w"].b.shape == ((INPUTS, rank), (rank, OUTPUTS))
    np.testing.assert_allclose(np.linalg.norm(full - update(small)), np.sqrt(np.sum(s[rank:] ** 2)), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(full - update(small), 2), s[rank] if rank < 6 else 0, atol=2e-5)
    # Dropping columns, as a toy would, loses far more.
    cut = float(adapted["w"].scale) * adapted["w"].a[:, :rank] @ adapted["w"].b[:rank]
    assert rank == 6 or np.linalg.norm(full - cut) > 1.5 * np.linalg.norm(full - update(small))
    u = np.linalg.svd(full)[0][:, :rank]
    assert np.max(subspace_angles(np.asarray(small["w"].a), u)) < 1e-4


@pytest.mark.parametrize("stabilized", [False, True])
def test_scales_differ_and_the_function_does_not(stabilized):
    adapted = lora(*planted(VALUES), rank_stabilized=stabilized)
    s = float(adapted["w"].scale)
    expected = {"proportional": s, "fixed": 3.0 / np.sqrt(2) if stabilized else 3.0 / 2}
    expected["sqrt"] = 3.0 * np.sqrt(2 / 6) / (np.sqrt(2) if stabilized else 2)
    for alpha, scale in expected.items():
        small = squeeze(adapted, 2, alpha=alpha)["w"]
        np.testing.assert_allclose(small.scale, scale, rtol=1e-6)
        assert_rounding(update({"w": small}), best(update(adapted), 2)[0], size=32, dtype="float32")
        # Balanced: both Gram matrices are the singular values of a b, times the ratio of scales.
        gram = np.diag(np.asarray(VALUES[:2]) * s / scale)
        np.testing.assert_allclose(small.a.T @ small.a, gram, atol=2e-5)
        np.testing.assert_allclose(small.b @ small.b.T, gram, atol=2e-5)


def test_squeezing_again_changes_nothing_and_gauges_do_not_matter():
    adapted = lora(*planted(VALUES))
    direct = squeeze(adapted, 2)
    for found in (squeeze(direct, 2), squeeze(squeeze(adapted, 4), 2)):
        np.testing.assert_allclose(found["w"].a, direct["w"].a, atol=1e-5)
        np.testing.assert_allclose(found["w"].b, direct["w"].b, atol=1e-5)
    gauge = normal(RANK, RANK, seed=5) + 3 * np.eye(RANK, dtype=np.float32)
    turned = lora(adapted["w"].a @ gauge, np.linalg.inv(gauge) @ adapted["w"].b)
    np.testing.assert_allclose(squeeze(turned, 2)["w"].a, direct["w"].a, atol=1e-4)
    np.testing.assert_allclose(squeeze(turned, 2)["w"].b, direct["w"].b, atol=1e-4)


def test_the_randomized_decomposition_is_close_where_values_fall():
    a, b = planted(0.9 ** np.arange(40), inputs=70, outputs=50)
    adapted = lora(a, b)
    for rank in (4, 16):
        small = squeeze(adapted, rank, algorithm="dense", key=KEY)
        _, s = best(update(adapted), rank)
        assert np.linalg.norm(update(adapted) - update(small)) <= 1.05 * np.sqrt(np.sum(s[rank:] ** 2))
    low = lora(*planted((2.0, 1.0, 0.5, 0.0, 0.0, 0.0)))
    np.testing.assert_allclose(update(squeeze(low, 3, algorithm="dense", key=KEY)), update(low), atol=1e-5)


def test_what_learned_nothing_stays_able_to_learn():
    fresh = sj.adapt({"w": jnp.zeros((INPUTS, OUTPUTS))}, {"w": sj.lora(6)}, key=KEY)
    low = lora(*planted((2.0, 1.0, 0.0, 0.0, 0.0, 0.0)))
    slope = jax.jit(jax.grad(lambda t, f: jnp.sum((sj.combine(t, f)["w"].materialize() - 1) ** 2)))
    for adapted, live in ((fresh, 0), (low, 2)):
        small = squeeze(adapted, 4)["w"]
        np.testing.assert_allclose(np.linalg.norm(small.a, axis=0)[live:], 1, rtol=1e-5)
        np.testing.assert_array_equal(small.b[live:], 0)
        np.testing.assert_allclose(small.a[:, live:].T @ small.a[:, live:], np.eye(4 - live), atol=1e-5)
        np.testing.assert_allclose(update({"w": small}), update(adapted), atol=1e-5)
        trainable, frozen = sj.partition({"w": small})
        gradient = slope(trainable, frozen)
        assert np.abs(gradient["w"].b).min(axis=1).max() > 0
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(gradient))


def test_a_larger_rank_is_drawn_and_loses_nothing():
    adapted = lora(*planted(VALUES))
    large = squeeze(adapted, 11, key=KEY)["w"]  # above the outputs, too
    assert (large.a.shape, large.b.shape) == ((INPUTS, 11), (11, OUTPUTS))
    np.testing.assert_allclose(update({"w": large}), update(adapted), atol=2e-5)
    np.testing.assert_array_equal(large.b[6:], 0)
    drawn = np.asarray(large.a[:, 6:])
    assert 0.5 / np.sqrt(INPUTS) < np.abs(drawn).max() <= 1 / np.sqrt(INPUTS)
    over = squeeze(lora(normal(3, 5), normal(5, 4)), 5, key=KEY)["w"]  # rank above the weight's smaller side
    assert over.a.shape == (3, 5)
    with pytest.raises(RankError, match=r"w: squeeze: .* 5 columns are to be drawn; pass key="):
        squeeze(adapted, 11)


def test_stacks_low_precision_and_ranks_by_path():
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    a, b = normal(3, 8, 5), normal(3, 5, 7, seed=1)
    fresh = sj.adapt({"w": jnp.zeros((3, 8, 7))}, {"w": sj.lora(5)}, key=KEY, roles=roles)["w"]
    stack = {"w": dataclasses.replace(fresh, a=jnp.asarray(a), b=jnp.asarray(b))}
    np.testing.assert_allclose(update(squeeze(stack, 2)), best(a.astype(np.float64) @ b, 2)[0], atol=2e-5)
    half = {"w": dataclasses.replace(fresh, a=jnp.asarray(a, jnp.bfloat16), b=jnp.asarray(b, jnp.bfloat16))}
    found = squeeze(half, 2)
    assert found["w"].a.dtype == found["w"].b.dtype == jnp.bfloat16
    size = np.abs(update(half)).max()
    np.testing.assert_allclose(update(found), best(update(half), 2)[0], atol=tolerance("bfloat16", room=2, norm=size))
    both = {"one": lora(*planted(VALUES))["w"], "two": lora(*planted(VALUES))["w"], "head": jnp.ones(3)}
    mixed = squeeze(both, {"one": 2, "o*": 5})
    assert (mixed["one"].rank, mixed["two"].rank) == (2, 6)
    assert mixed["two"] is both["two"]
    convolution = sj.adapt(
        {"w": jnp.zeros((3, 3, 2, 4))}, {"w": sj.lora(4)}, key=KEY, roles={"w": sj.Role.dense((0, 1, 2), (3,))}
    )
    assert squeeze(convolution, 2)["w"].b.shape == (2, 4)
    inside = sj.adapt({"w": jnp.asarray(normal(8, 7))}, {"w": sj.dora(sj.lora(5))}, key=KEY)
    assert squeeze(inside, 2)["w"].direction.rank == 2


def test_spectra_and_the_recommended_rank():
    adapted = lora(*planted(VALUES))
    found = spectrum(adapted)["w"]
    np.testing.assert_allclose(found, 0.5 * np.asarray(VALUES), atol=1e-5)
    energy = np.cumsum(np.square(VALUES)) / np.sum(np.square(VALUES))
    np.testing.assert_allclose(retained(found), energy, rtol=1e-5)
    for threshold in (0.5, 0.9, 0.95, 1.0):
        by_hand = next(k for k in range(1, 7) if energy[k - 1] >= threshold - 1e-6)
        assert recommend_rank({"w": found}, threshold) == by_hand
    flat = jnp.ones(4)  # the mean over matrices, of which one is short
    mean = (energy + np.array([0.25, 0.5, 0.75, 1, 1, 1])) / 2
    assert recommend_rank({"a": found, "b": flat}, 0.8) == int(np.argmax(mean >= 0.8)) + 1
    assert recommend_rank({"a": jnp.zeros(3)}) == 1


def test_plans_keep_the_number_of_steps():
    assert stages(32, 4, 202) == (Stage(32, 50), Stage(16, 50), Stage(8, 50), Stage(4, 52))
    assert stages(7, 1, 100) == (Stage(7, 25), Stage(4, 25), Stage(2, 25), Stage(1, 25))  # halves round up
    assert stages(32, 12, 9)[1:] == (Stage(16, 3), Stage(12, 3))
    assert stages(8, 2, 1000, split="min_stage") == (Stage(8, 200), Stage(4, 200), Stage(2, 600))
    assert stages(8, 2, 100, split="rank_proportional") == (Stage(8, 57), Stage(4, 28), Stage(2, 15))
    assert stages(4, 4, 5) == (Stage(4, 5),)
    with pytest.raises(RankError, match=r"stages: steps=399 are too few for 3 stages .* \[200, 200, -1\]"):
        stages(8, 2, 399, split="min_stage")
    with pytest.raises(RankError, match=r"stages: target=9 is above"):
        stages(8, 9, 10)


TARGET = jnp.asarray(planted((3.0, 2.0, 1.0, 0.5))[0] @ planted((3.0, 2.0, 1.0, 0.5))[1])


def distance(tree, _):
    return jnp.sum((tree["w"].materialize() - TARGET) ** 2)


@pytest.mark.parametrize("moments", ["reset", "project"])
def test_training_in_stages_traces_once_for_every_rank(moments):
    adapted = sj.adapt({"w": jnp.zeros((INPUTS, OUTPUTS))}, {"w": sj.lora(8)}, key=KEY)
    optimizer = optax.adam(optax.linear_schedule(3e-2, 3e-3, 90))
    traces, seen = [], []

    @functools.partial(jax.jit, static_argnames="steps")
    def run(adapted, state, first, steps):
        traces.append(adapted["w"].rank)
        end = sj.training.scan_steps(distance, optimizer, adapted, steps=steps, opt_state=state)
        return end.adapted, end.opt_state

    def watched(adapted, state, first, steps):
        seen.append((adapted["w"].rank, first, steps, [int(s.count) for s in state]))
        return run(adapted, state, first, steps)

    plan = stages(8, 2, 90)
    trained, _ = train_in_stages(watched, optimizer, adapted, plan, moments=moments, alpha="fixed")
    assert traces == [8, 4, 2]
    assert trained["w"].rank == 2
    assert sj.summary(trained).trainable == 2 * (INPUTS + OUTPUTS)
    # The schedule runs on; Adam's own count only with the moments.
    adam = [0, 0, 0] if moments == "reset" else [0, 30, 60]
    assert seen == [(r, 30 * i, 30, [adam[i], 30 * i]) for i, r in enumerate((8, 4, 2))]
    assert distance(trained, None) < 0.5 * distance(adapted, None)


def test_nothing_is_lost_where_nothing_is_cut_and_moments_are_those_of_the_new_factors():
    adapted = lora(*planted((3.0, 2.0, 1.0, 0.0, 0.0, 0.0)))
    small = squeeze(adapted, 3, alpha="fixed")
    np.testing.assert_allclose(distance(small, None), distance(adapted, None), rtol=1e-5)
    optimizer = optax.trace(0.9)

    def moment(tree):
        trainable, frozen = sj.partition(tree)
        gradient = jax.grad(lambda t: distance(sj.combine(t, frozen), None))(trainable)
        return optimizer.update(gradient, optimizer.init(trainable))[1]

    found = squeeze_state(optimizer, moment(adapted), adapted, small, moments="project")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found, moment(small))
    # A moment of one entry: its square is transformed by squares.
    trainable, _ = sj.partition(adapted)
    one = jax.tree.map(lambda v: jnp.zeros_like(v).at[0, 0].set(2.0), trainable)
    state = optax.scale_by_adam().init(trainable)._replace(mu=one, nu=jax.tree.map(jnp.square, one))
    found = squeeze_state(optax.scale_by_adam(), state, adapted, small, moments="project")
    for mu, nu in zip(jax.tree.leaves(found.mu), jax.tree.leaves(found.nu), strict=True):
        np.testing.assert_allclose(nu, mu**2, rtol=1e-4, atol=1e-6)


def test_a_bank_serves_squeezed_adapters():
    params, x, rows = {"w": jnp.zeros((INPUTS, OUTPUTS))}, normal(4, INPUTS, seed=7), jnp.array([1, 2, 0, 3])
    made = [squeeze(lora(*planted(VALUES, seed=i)), r, alpha="fixed") for i, r in enumerate((3, 1))] + [
        lora(*planted(VALUES, seed=2))
    ]
    found = jax.jit(sj.per_row(lambda p, x: x @ p["w"]))(sj.bank(params, made), rows, x)
    for i, row in enumerate(np.asarray(rows)):
        expected = x[i] @ update(made[row - 1]) if row else np.zeros(OUTPUTS)
        np.testing.assert_allclose(found[i], expected, atol=1e-4)


def test_bad_input_is_refused_by_path():
    params = {"w": jnp.asarray(normal(8, 8))}
    for method, kind in ((sj.pissa(2), "'pissa'"), (sj.matryoshka(sj.lora(2)), r"'matryoshka\(lora\)'")):
        adapted = sj.adapt(params, {"w": method}, key=KEY)
        with pytest.raises(StructureError, match=rf"w: squeeze: the \w+ of {kind} is no LoRA"):
            squeeze(adapted, 1)
    with pytest.raises(StructureError, match="the tree holds no LoRA"):
        squeeze(params, 1)
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY)
    with pytest.raises(PatternError, match=r"squeeze: rank has 'v', which matches no LoRA; nearest are 'w'"):
        squeeze(adapted, {"v": 1})
    with pytest.raises(RankError, match=r"squeeze: rank of 'w'=0"):
        squeeze(adapted, {"w": 0})
    with pytest.raises(RankError, match=r"squeeze: the dense algorithm draws a random matrix; pass key="):
        squeeze(adapted, 1, algorithm="dense")
    for options in ({"alpha": "x"}, {"algorithm": "x"}, {"oversample": -1}, {"iterations": -1}):
        with pytest.raises(ValueError, match=f"squeeze: {next(iter(options))}="):
            squeeze(adapted, 1, **options)
    with pytest.raises(ValueError, match="recommend_rank: threshold=0"):
        recommend_rank({}, 0.0)
    with pytest.raises(StructureError, match="the plan has no stages"):
        train_in_stages(lambda *a: a[:2], optax.sgd(1.0), adapted, ())
