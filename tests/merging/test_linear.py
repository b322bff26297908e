import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import average, task_arithmetic

from ..tolerances import assert_rounding
from . import trees


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_task_arithmetic_equals_a_float64_loop(dtype):
    base = trees.base_tree(dtype=dtype)
    experts = trees.full_experts(base)
    weights = [0.5, -1.0, 0.25]
    merged = task_arithmetic(experts, base, weights=weights)
    start, moved = trees.arrays(base), [trees.arrays(e) for e in experts]
    for path in trees.SHAPES:
        expected = start[path] + sum(w * (m[path] - start[path]) for w, m in zip(weights, moved, strict=True))
        assert merged[path].dtype == dtype
        expected = np.asarray(jnp.asarray(expected, jnp.float32).astype(dtype), np.float64)
        assert_rounding(
            np.asarray(merged[path], np.float64), expected, dtype="float32" if dtype == jnp.float32 else "bfloat16"
        )


def test_bfloat16_updates_are_added_before_rounding():
    """Eight updates of a quarter of a rounding step each are seen; added one by one in bfloat16 they would be lost."""
    base = {"w": jnp.ones(4, jnp.bfloat16)}
    step = 2.0**-7
    experts = [{"w": jnp.full(4, 1 + step, jnp.bfloat16)} for _ in range(8)]
    merged = task_arithmetic(experts, base, weights=0.25)
    assert merged["w"].tolist() == [1 + 2 * step] * 4


def test_integer_leaves_pass_through():
    base = trees.base_tree()
    experts = [e | {"steps": jnp.zeros(3, jnp.int32)} for e in trees.full_experts(base)]
    assert task_arithmetic(experts, base)["steps"] is base["steps"]


def test_average_is_task_arithmetic_of_one_over_n_and_needs_no_base():
    base = trees.base_tree()
    experts = trees.full_experts(base)
    expected = {p: np.mean([trees.arrays(e)[p] for e in experts], axis=0) for p in trees.SHAPES}
    for merged in (average(experts), average(experts, base), task_arithmetic(experts, base, weights=1 / 3)):
        for path in trees.SHAPES:
            assert_rounding(np.asarray(merged[path]), expected[path])
    weighted = average(experts, weights=[1, 2, 5])
    expected = np.average([np.asarray(e["dense"], np.float64) for e in experts], axis=0, weights=[1, 2, 5])
    assert_rounding(np.asarray(weighted["dense"]), expected)


METHODS = [sj.lora(rank=2, alpha=3.0), sj.lora(rank=5, alpha=1.0), sj.lora(rank=3, alpha=4.0, rank_stabilized=True)]


def test_loras_of_unequal_ranks_and_scales_add_exactly():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, METHODS)
    weights = [1.0, -1.0, 0.5]
    merged = task_arithmetic(experts, base, weights=weights)
    for path in ("dense", "wide", "stack"):
        assert isinstance(merged[path], sj.weights.LowRank)
        assert merged[path].rank == 10
        assert merged[path].base is base[path]
        found = np.asarray(merged[path].a, np.float64) @ np.asarray(merged[path].b, np.float64)
        expected = sum(
            w * e[path].scale * (np.asarray(e[path].a, np.float64) @ np.asarray(e[path].b, np.float64))
            for w, e in zip(weights, experts, strict=True)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert merged["bias"] is base["bias"]


def test_weights_one_and_minus_one_have_no_cross_terms():
    """The same adapter at two ranks, one padded by random halves that cancel, is nothing."""
    base = trees.base_tree()
    one, _, _ = trees.adapted_experts(base, METHODS)
    a, b = one["dense"].a, one["dense"].b
    noise = jax.random.normal(jax.random.key(7), (12, 2))
    other = trees.with_leaf(
        one,
        "dense",
        a=jnp.concatenate([a, noise, noise], axis=1),
        b=jnp.concatenate([b, b[:2], -b[:2]]) * one["dense"].scale / 0.5,
        scale=0.5,
    )
    merged = task_arithmetic([one, other], base, weights=[1, -1])
    change = np.asarray(merged["dense"].a, np.float64) @ np.asarray(merged["dense"].b, np.float64)
    assert np.abs(change).max() < 1e-6


def test_pissa_is_added_by_its_change():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.pissa(rank=2), sj.lora(rank=3)])
    merged = task_arithmetic(experts, base, weights=[1.0, 2.0])
    start, moved = trees.arrays(base), [trees.arrays(trees.plain(e)) for e in experts]
    for path in ("dense", "wide", "stack"):
        assert merged[path].rank == 2 * 2 + 3
        expected = moved[0][path] + 2 * (moved[1][path] - start[path])
        assert_rounding(np.asarray(merged[path].materialize()), expected, size=4)


def test_two_doras_merge_to_a_dora_of_the_sum_of_their_forwards():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.dora(sj.lora(rank=2)), sj.dora(sj.lora(rank=3, alpha=9.0))])
    weights = [0.7, -0.4]
    merged = task_arithmetic(experts, base, weights=weights)
    x = np.random.default_rng(5).normal(size=(7, 12)).astype(np.float32)
    apply = jax.jit(sj.with_adapters(lambda p, x: x @ p["dense"]))
    outputs = [np.asarray(apply(e, x), np.float64) for e in experts]
    start = x.astype(np.float64) @ np.asarray(base["dense"])
    expected = start + sum(w * (y - start) for w, y in zip(weights, outputs, strict=True))
    assert type(merged["dense"]).__name__ == "Magnitude"
    assert merged["dense"].rank == 5
    np.testing.assert_allclose(apply(merged, x), expected, rtol=0, atol=2e-5)
    start, moved = trees.arrays(base), [trees.arrays(e) for e in experts]
    for path in ("wide", "stack"):
        expected = start[path] + sum(w * (m[path] - start[path]) for w, m in zip(weights, moved, strict=True))
        assert_rounding(np.asarray(merged[path].materialize()), expected, size=16)


def test_a_dora_that_takes_a_column_out_is_formed():
    base = trees.base_tree()
    (expert,) = trees.adapted_experts(base, [sj.dora(sj.lora(rank=2))])
    gone = trees.with_leaf(expert, "dense", magnitude=expert["dense"].magnitude.at[3].set(0.0))
    merged = task_arithmetic([gone], base, weights=1.0)
    assert type(merged["dense"]).__name__ == "Full"
    assert_rounding(np.asarray(merged["dense"].value), np.asarray(gone["dense"].materialize()), size=4)


def test_lora_beside_dora_oft_and_full_weights():
    base = trees.base_tree()
    experts = [
        *trees.adapted_experts(base, [sj.lora(rank=2), sj.dora(sj.lora(rank=3)), sj.oft(block_size=2), sj.full()]),
        *trees.full_experts(base, 1),
    ]
    merged = task_arithmetic(experts, base, weights=0.2)
    start, moved = trees.arrays(base), [trees.arrays(trees.plain(e)) for e in experts]
    for path in ("dense", "wide", "stack", "bias"):
        expected = start[path] + 0.2 * sum(m[path] - start[path] for m in moved)
        found = merged[path].value if path != "bias" else merged[path]
        assert_rounding(np.asarray(found), expected, size=4)
    pair = task_arithmetic(experts[:2], base, weights=0.2)
    assert type(pair["dense"]).__name__ == "Magnitude"


def test_experts_may_adapt_different_leaves():
    base = trees.base_tree()
    first = trees.moved(sj.adapt(base, {"dense": sj.lora(rank=2)}, key=jax.random.key(0)), 0)
    second = trees.moved(sj.adapt(base, {"wide": sj.lora(rank=3)}, key=jax.random.key(1)), 1)
    merged = task_arithmetic([first, second], base, weights=1.0)
    assert (merged["dense"].rank, merged["wide"].rank) == (2, 3)
    assert merged["stack"] is base["stack"]


def test_a_convolution_kernel_merges_by_its_role():
    base = {"k": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 5)), jnp.float32)}
    roles = {"k": sj.Role.conv()}
    experts = [
        trees.moved(sj.adapt(base, {"k": sj.lora(rank=r)}, key=jax.random.key(r), roles=roles), r) for r in (1, 3)
    ]
    merged = task_arithmetic(experts, base, weights=[1.0, 0.5])
    start, moved = trees.arrays(base)["k"], [trees.arrays(e)["k"] for e in experts]
    expected = start + (moved[0] - start) + 0.5 * (moved[1] - start)
    assert merged["k"].rank == 4
    assert_rounding(np.asarray(merged["k"].materialize()), expected, size=4)


def test_save_and_load_of_a_merged_adapter(tmp_path):
    base = trees.base_tree()
    for experts in (
        trees.adapted_experts(base, METHODS),
        trees.adapted_experts(base, [sj.dora(sj.lora(rank=2)), sj.dora(sj.lora(rank=3))]),
        trees.adapted_experts(base, [sj.oft(block_size=2), sj.lora(rank=1)]),
    ):
        merged = task_arithmetic(experts, base)
        path = sj.save_adapter(tmp_path / "merged.safetensors", merged, base=base)
        again = sj.load_adapter(path, base)
        for leaf, other in zip(jax.tree.leaves(merged), jax.tree.leaves(again), strict=True):
            assert np.array_equal(leaf, other)
        sj.merging.average([again, again], base)  # merged adapters are experts again


def test_under_jit_with_traced_weights_and_no_second_compilation():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, METHODS)
    count = 0

    @jax.jit
    def merge(experts, base, weights):
        nonlocal count
        count += 1
        return task_arithmetic(experts, base, weights=weights)

    expected = task_arithmetic(experts, base, weights=[0.1, 0.2, 0.3])
    found = merge(experts, base, jnp.array([0.1, 0.2, 0.3]))
    merge(experts, base, jnp.array([1.0, -1.0, 0.0]))
    assert count == 1
    for path in ("dense", "wide", "stack"):
        assert_rounding(np.asarray(found[path].materialize()), np.asarray(expected[path].materialize()))


def test_coefficients_can_be_learned():
    base = trees.base_tree()
    experts = trees.full_experts(base)

    def loss(weights):
        return jnp.sum(task_arithmetic(experts, base, weights=weights)["dense"] ** 2)

    weights = jnp.array([0.1, 0.2, 0.3])
    gradient = jax.jit(jax.grad(loss))(weights)
    start = np.asarray(base["dense"], np.float64)
    deltas = [np.asarray(e["dense"], np.float64) - start for e in experts]
    merged = start + sum(w * d for w, d in zip(np.asarray(weights, np.float64), deltas, strict=True))
    assert_rounding(np.asarray(gradient), np.array([2 * np.sum(merged * d) for d in deltas]), size=100)


def test_quantized_bases_stay_quantized():
    base = {"w": sj.weights.quantize_nf4(jax.random.normal(jax.random.key(0), (64, 32)), role=sj.Role.dense())}
    experts = []
    for rank in (1, 2):
        array = base["w"].materialize()
        adapted = sj.adapt({"w": array}, {"w": sj.lora(rank=rank)}, key=jax.random.key(rank))
        adapted = trees.moved(adapted, rank)
        experts.append({"w": dataclasses.replace(adapted["w"], base=base["w"])})
    merged = task_arithmetic(experts, base, weights=1.0)
    assert merged["w"].base is base["w"]
    assert merged["w"].rank == 3
