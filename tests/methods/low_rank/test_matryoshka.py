"""MatryoshkaLoRA and DyLoRA against brute force over ranks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError
from subspace_jax.methods.low_rank.matryoshka import training_gains
from tests.tolerances import tolerance

SCALES = {"none": lambda r: 1.0, "rank": lambda r: 1.0 / r, "sqrt": lambda r: r**-0.5}
W = jnp.asarray(np.random.default_rng(0).normal(size=(10, 7)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 10)), jnp.float32)


def trained(rank=8, stack=(), **options):
    """An adapter after a change of both factors."""
    w = jnp.broadcast_to(W, (*stack, *W.shape))
    roles = {"w": sj.Role.dense(in_axes=(len(stack),), out_axes=(len(stack) + 1,), stack_axes=tuple(range(len(stack))))}
    method = sj.matryoshka(sj.lora(rank), **options)
    tree = sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0), roles=roles)
    rng = np.random.default_rng(2)
    moved = {n: jnp.asarray(rng.normal(size=getattr(tree["w"], n).shape), jnp.float32) for n in ("a", "b")}
    return {"w": dataclasses.replace(tree["w"], **moved)}


apply = sj.with_adapters(lambda params, x: x @ params["w"])


@pytest.mark.parametrize("rank_scale", SCALES)
@pytest.mark.parametrize("ranks", [(1, 2, 4, 8), (3,), (2, 5), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_gains_are_the_sum_over_ranks(rank_scale, ranks):
    brute = np.zeros(8)
    for r in ranks:
        brute[:r] += SCALES[rank_scale](r)
    gains = training_gains(ranks, 8, rank_scale)
    np.testing.assert_allclose(gains, brute, rtol=tolerance())
    assert (np.diff(gains) <= 0).all()
    assert len(set(gains[gains > 0].tolist())) <= len(ranks)
    np.testing.assert_allclose(gains.sum(), sum(r * SCALES[rank_scale](r) for r in ranks), rtol=tolerance())


def test_gains_of_the_publication():
    np.testing.assert_allclose(
        training_gains((1, 2, 4, 8), 8, "sqrt"), [2.56066, 1.56066, *[0.853553] * 2, *[0.353553] * 4], rtol=1e-5
    )
    np.testing.assert_allclose(training_gains((1, 2, 4, 8), 8, "rank"), [1.875, 0.875, *[0.375] * 2, *[0.125] * 4])
    np.testing.assert_allclose(
        training_gains((1, 2, 4, 8), 8, "none", normalize=True), [1, 0.75, 0.5, 0.5, *[0.25] * 4]
    )


@pytest.mark.parametrize("rank_scale", SCALES)
def test_training_output_is_the_sum_of_the_adapters_of_every_rank(rank_scale):
    tree = trained(ranks=(1, 3, 8), rank_scale=rank_scale)
    a, b = np.asarray(tree["w"].a, np.float64), np.asarray(tree["w"].b, np.float64)
    each = {r: SCALES[rank_scale](r) * np.asarray(X) @ a[:, :r] @ b[:r] for r in (1, 3, 8)}
    np.testing.assert_allclose(apply(tree, X) - X @ W, sum(each.values()), rtol=1e-4, atol=1e-4)
    for r, expected in each.items():
        np.testing.assert_allclose(
            apply(sj.methods.matryoshka.at_rank(tree, r), X) - X @ W, expected, rtol=1e-4, atol=1e-4
        )


def test_fresh_adapter_is_the_array_at_every_rank_and_preset():
    for options in ({}, {"rank_scale": "sqrt"}, {"normalize": True}, {"a_init": "lora"}, {"ranks": (4,)}):
        tree = sj.adapt({"w": W}, {"w": sj.matryoshka(sj.lora(4), **options)}, key=jax.random.key(0))
        for rank in (1, 2, 3, 4):
            for inference in ("published", "keep_p"):
                np.testing.assert_array_equal(
                    sj.merge(sj.methods.matryoshka.at_rank(tree, rank, inference=inference))["w"], W
                )


def test_one_rank_is_lora_with_its_scale():
    tree = trained(ranks=(8,), rank_scale="sqrt")
    plain = sj.adapt({"w": W}, {"w": sj.lora(8, alpha=8 / np.sqrt(8))}, key=jax.random.key(0))
    plain = {"w": dataclasses.replace(plain["w"], a=tree["w"].a, b=tree["w"].b)}
    np.testing.assert_allclose(apply(tree, X), apply(plain, X), rtol=1e-5)


@pytest.mark.parametrize("inference", ["published", "keep_p"])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_truncated_adapter_depends_on_nothing_beyond_its_rank(inference, stack):
    tree = trained(stack=stack, rank_scale="rank")
    cut = sj.methods.matryoshka.truncate_rank(tree, 3, inference=inference)
    assert cut["w"].a.shape[-1] == 3
    assert type(cut["w"]).__name__ == "LowRank"
    np.testing.assert_allclose(
        sj.merge(cut)["w"],
        sj.merge(sj.methods.matryoshka.at_rank(tree, 3, inference=inference))["w"],
        rtol=1e-5,
        atol=1e-5,
    )
    spoiled = {
        "w": dataclasses.replace(tree["w"], a=tree["w"].a.at[..., 3:].set(99), b=tree["w"].b.at[..., 3:, :].set(7))
    }
    np.testing.assert_array_equal(
        sj.merge(sj.methods.matryoshka.truncate_rank(spoiled, 3, inference=inference))["w"], sj.merge(cut)["w"]
    )


def test_keep_p_at_the_largest_rank_is_the_training_function():
    tree = trained(rank_scale="sqrt")
    once = sj.methods.matryoshka.at_rank(tree, 2)
    np.testing.assert_array_equal(apply(sj.methods.matryoshka.at_rank(once, 8, inference="keep_p"), X), apply(tree, X))


def gradients(tree, change=lambda t: t):
    learned, frozen = sj.partition(tree)
    return jax.jit(jax.grad(lambda t: jnp.sin(apply(change(sj.combine(t, frozen)), X)).sum()))(learned)["w"]


def test_gradient_of_a_column_scales_with_its_gain():
    tree = trained(ranks=(1, 2, 4))  # columns 5 to 8 belong to no rank
    a, b = np.asarray(tree["w"].a, np.float64), np.asarray(tree["w"].b, np.float64)
    gains = np.array([3, 2, 1, 1, 0, 0, 0, 0])
    upstream = np.asarray(X).T @ np.cos(np.asarray(X) @ (np.asarray(W) + (a * gains) @ b))
    found = gradients(tree)
    np.testing.assert_allclose(found.a, (upstream @ b.T) * gains, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.b, (a * gains).T @ upstream, rtol=1e-3, atol=1e-3)
    assert not np.asarray(found.a)[:, 4:].any()
    assert not np.asarray(found.b)[4:].any()
    assert found.gains is None


def test_a_sampled_rank_is_the_same_in_every_layer_and_leaves_the_rest_alone():
    tree = {"one": trained()["w"], "two": trained(stack=(2,))["w"], "plain": jnp.ones(3)}
    drawn = set()
    for seed in range(12):
        sampled, rank = jax.jit(sj.methods.matryoshka.sample_rank)(tree, jax.random.key(seed))
        drawn.add(int(rank))
        for name in ("one", "two"):
            np.testing.assert_array_equal(np.asarray(sampled[name].gains) > 0, np.arange(8) < rank)
    assert drawn <= {1, 2, 4, 8}
    assert len(drawn) > 2
    ranks = {
        int(sj.methods.matryoshka.sample_rank(tree, jax.random.key(seed), every_rank=True)[1]) for seed in range(40)
    }
    assert ranks - {1, 2, 4, 8}
    assert max(ranks) <= 8


@pytest.mark.parametrize("only_last", [False, True])
def test_sampled_step_moves_only_the_drawn_columns(only_last):
    key = jax.random.key(4)
    rank = int(sj.methods.matryoshka.sample_rank(trained(), key)[1])
    found = gradients(trained(), lambda t: sj.methods.matryoshka.sample_rank(t, key, only_last=only_last)[0])
    learns = np.abs(np.asarray(found.a)).max(axis=0) > 0
    first = rank - 1 if only_last else 0
    np.testing.assert_array_equal(learns, (np.arange(8) >= first) & (np.arange(8) < rank))


def test_the_mean_over_ranks_of_the_sampled_update_is_the_training_update():
    """Linear in the mask: E[s(r) A P_r B] = A P B / |S|."""
    tree = trained(ranks=(1, 2, 8), rank_scale="rank")
    each = [sj.merge(sj.methods.matryoshka.at_rank(tree, r))["w"] - W for r in (1, 2, 8)]
    np.testing.assert_allclose(np.mean(each, axis=0), (sj.merge(tree)["w"] - W) / 3, rtol=1e-4, atol=1e-5)


def test_original_dylora_scale_is_alpha_over_the_drawn_rank():
    tree = trained()
    method = sj.matryoshka(sj.lora(8, alpha=2.0 * 8), rank_scale="rank")
    made = sj.adapt({"w": W}, {"w": method}, key=jax.random.key(0))
    made = {"w": dataclasses.replace(made["w"], a=tree["w"].a, b=tree["w"].b)}
    delta = sj.merge(sj.methods.matryoshka.at_rank(made, 5))["w"] - W
    np.testing.assert_allclose(delta, 2.0 / 5 * tree["w"].a[:, :5] @ tree["w"].b[:5], rtol=1e-4, atol=1e-4)


def test_a_traced_rank_compiles_once():
    tree, traces = trained(), []

    @jax.jit
    def outputs(tree, rank):
        traces.append(None)
        return apply(sj.methods.matryoshka.at_rank(tree, rank), X)

    for rank in (1, 4, 8):
        np.testing.assert_allclose(
            outputs(tree, rank), apply(sj.methods.matryoshka.at_rank(tree, rank), X), rtol=1e-5, atol=1e-5
        )
    assert len(traces) == 1


@pytest.mark.parametrize(("a_init", "bound"), [("official", 1 / np.sqrt(8)), ("lora", 1 / np.sqrt(400))])
def test_width_of_the_first_draw(a_init, bound):
    method = sj.matryoshka(sj.lora(8), a_init=a_init)
    a = np.asarray(sj.adapt({"w": jnp.ones((400, 7))}, {"w": method}, key=jax.random.key(0))["w"].a)
    assert 0.95 * bound < np.abs(a).max() <= bound * (1 + 1e-6)


def test_ranks_above_the_adapters_are_dropped():
    adapted = sj.adapt({"w": W}, {"w": sj.matryoshka(sj.lora(6), ranks=(16, 4, 1))}, key=jax.random.key(0))
    assert adapted["w"].ranks == (1, 4)
    assert sj.adapt({"w": W}, {"w": sj.matryoshka(sj.lora(6))}, key=jax.random.key(0))["w"].ranks == (1, 2, 4, 6)


def test_the_count_is_loras():
    adapted = sj.adapt({"w": W}, {"w": sj.matryoshka(sj.lora(6))}, key=jax.random.key(0))
    assert sj.summary(adapted).trainable == 6 * (10 + 7)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="starts at zero"):
        sj.adapt({"w": W}, {"w": sj.matryoshka(sj.pissa(4))}, key=jax.random.key(0))
    with pytest.raises(RankError, match="all above the adapter's rank 4"):
        sj.adapt({"w": W}, {"w": sj.matryoshka(sj.lora(4), ranks=(8, 16))}, key=jax.random.key(0))
    with pytest.raises(RankError, match=r"rank=9: expected an int of at least 1 and at most 8"):
        sj.methods.matryoshka.at_rank(trained(), 9)
    for wrong in (2.5, "2", jnp.float32(2)):
        with pytest.raises(RankError, match=r"rank=.*expected an int"):
            sj.methods.matryoshka.at_rank(trained(), wrong)
    with pytest.raises(RankError, match=r"rank is a traced float32\[\]: expected an integer scalar"):
        jax.jit(sj.methods.matryoshka.at_rank)(trained(), 2.5)
    assert sj.methods.matryoshka.at_rank(trained(), np.int64(2))["w"].gains.tolist()[2:] == [0.0] * 6
    with pytest.raises(RankError, match="must agree"):
        sj.methods.matryoshka.sample_rank({"one": trained()["w"], "two": trained(ranks=(2,))["w"]}, jax.random.key(0))
    with pytest.raises(RankError, match="there must be one"):
        sj.methods.matryoshka.sample_rank({"w": W}, jax.random.key(0))
    with pytest.raises(TypeError, match="takes a method"):
        sj.matryoshka(4)
