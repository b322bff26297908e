import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import kth_magnitude, task_arithmetic, ties

from ..tolerances import assert_rounding
from . import trees


def reference(vectors, density, keep, elect="sum", combine="mean", zeros="majority", weights=None):
    """One loop per entry over task vectors `[experts, entries]` in float64."""
    count = vectors.shape[1]
    number = int(density * count)
    trimmed = np.zeros_like(vectors)
    for i, vector in enumerate(vectors):
        sizes = np.abs(vector)
        if keep == "exact":
            chosen = sorted(range(count), key=lambda j: (-sizes[j], j))[:number]
        else:
            place = count - number
            cut = np.sort(sizes)[place - 1] if place else -1.0
            chosen = [j for j in range(count) if sizes[j] >= cut]
        trimmed[i, chosen] = vector[chosen]
    votes = trimmed if elect == "sum" else np.sign(trimmed)
    sign = np.sign(votes.sum(0))
    tie = 1.0 if zeros == "positive" else np.sign(sign.sum())
    sign = np.where(sign == 0, tie, sign)
    weights = np.ones(len(vectors)) if weights is None else np.asarray(weights)
    merged = np.zeros(count)
    for j in range(count):
        agree = [w * v for w, v in zip(weights, trimmed[:, j], strict=True) if v * sign[j] > 0]
        if agree and combine == "max":
            merged[j] = max(map(abs, agree)) * sign[j]
        elif agree:
            merged[j] = sum(agree) / (len(agree) if combine == "mean" else 1)
    return merged


def vectors_of(base, experts):
    start, moved = trees.arrays(base), [trees.arrays(e) for e in experts]
    names = sorted(trees.SHAPES)
    return np.stack([np.concatenate([(m[n] - start[n]).ravel() for n in names]) for m in moved]), names


@pytest.mark.parametrize("keep", ["official", "exact"])
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("zeros", ["majority", "positive"])
def test_whole_tree_equals_a_loop(keep, elect, combine, zeros):
    base = jax.tree.map(jnp.zeros_like, trees.base_tree())
    # Few values, so that magnitudes and votes are often equal.
    experts = [jax.tree.map(lambda v: jnp.round(3 * v) / 4, e) for e in trees.full_experts(base, 4, size=1.0)]
    vectors, names = vectors_of(base, experts)
    weights = [1.0, 0.5, 2.0, 1.0]
    merged = ties(experts, base, density=0.3, keep=keep, elect=elect, combine=combine, zeros=zeros, weights=weights)
    expected = reference(vectors, 0.3, keep, elect, combine, zeros, weights)
    found = np.concatenate([np.asarray(merged[n]).ravel() for n in names])
    assert_rounding(found, expected)


@pytest.mark.parametrize("keep", ["official", "exact"])
@pytest.mark.parametrize("density", [0.2, 0.01, 1.0])
def test_by_leaf_equals_a_loop(keep, density):
    base = trees.base_tree()
    experts = trees.full_experts(base)
    merged = ties(experts, base, density=density, keep=keep, scope="leaf", scale=0.5)
    start, moved = trees.arrays(base), [trees.arrays(e) for e in experts]
    for path, shape in trees.SHAPES.items():
        # In float32, as the library rounds the differences: which entry is largest may hang on it.
        vectors = np.stack([np.asarray(e[path] - base[path], np.float64).ravel() for e in experts])
        expected = start[path] + 0.5 * reference(vectors, density, keep).reshape(shape)
        assert_rounding(np.asarray(merged[path]), expected)
    del moved


def test_official_rule_keeps_one_entry_more():
    base = {"w": jnp.zeros(10)}
    experts = [{"w": jnp.arange(1.0, 11.0)}, {"w": jnp.arange(1.0, 11.0)}]
    assert int((ties(experts, base, density=0.2)["w"] != 0).sum()) == 3
    assert int((ties(experts, base, density=0.2, keep="exact")["w"] != 0).sum()) == 2


def test_invariants():
    base = trees.base_tree()
    experts = trees.full_experts(base, 4)
    merged = ties(experts, base, density=0.4)
    shuffled = ties([experts[i] for i in (2, 0, 3, 1)], base, density=0.4)
    for path in trees.SHAPES:
        deltas = np.stack([np.asarray(e[path] - base[path]) for e in experts])
        change = np.asarray(merged[path]) - np.asarray(base[path])
        assert np.abs(change).max() <= np.abs(deltas).max() + 1e-6
        assert_rounding(np.asarray(shuffled[path]), np.asarray(merged[path]))
    same = ties([experts[0]] * 3, base, density=1.0)
    for path in trees.SHAPES:
        assert_rounding(np.asarray(same[path]), np.asarray(experts[0][path]))


def test_adapters_are_merged_by_what_they_change():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.lora(rank=2), sj.oft(block_size=2), sj.dora(sj.lora(rank=3))])
    merged = ties(experts, base, density=0.3)
    formed = ties([trees.plain(e) for e in experts], base, density=0.3)
    for path in ("dense", "wide", "stack"):
        assert type(merged[path]).__name__ == "Full"
        assert_rounding(np.asarray(merged[path].value), np.asarray(formed[path]), size=4)


@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize("keep", ["official", "exact"])
def test_under_jit(scope, keep):
    base = trees.base_tree()
    experts = trees.full_experts(base)
    function = functools.partial(ties, density=0.3, scope=scope, keep=keep)
    found, expected = jax.jit(function)(experts, base), function(experts, base)
    for path in trees.SHAPES:
        assert_rounding(np.asarray(found[path]), np.asarray(expected[path]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_kth_magnitude_is_that_of_a_sort(dtype):
    generator = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        parts = [generator.normal(size=n) * 10.0 ** generator.integers(-30, 20, n) for n in (50, 1, 300)]
        leaves = [jnp.asarray(p, dtype) for p in [*parts, np.zeros(5)]]
        ordered = np.sort(np.abs(np.concatenate([np.asarray(v, np.float64) for v in leaves])))
        for place in (1, 5, 6, 100, 356):
            found = kth_magnitude(lambda: iter(leaves), place)
            assert found.dtype == dtype
            assert float(found) == ordered[place - 1]


def test_sign_conflicts_of_sparse_updates():
    """Shared large entries of a few flipped signs in noise: TIES is nearer the majority than the sum is."""
    leads = []
    for seed in range(3):
        generator = np.random.default_rng(seed)
        sign = generator.choice([-1.0, 1.0], 20000)
        large = generator.random((8, 20000)) < 0.05
        flip = np.where(generator.random((8, 20000)) < 0.15, -1.0, 1.0)
        vectors = (large * flip * sign + 0.15 * generator.normal(size=(8, 20000))).astype(np.float32)
        target = np.sign((large * flip * sign).sum(0)) * large.any(0)
        base, experts = {"w": jnp.zeros(20000)}, [{"w": jnp.asarray(v)} for v in vectors]

        def cosine(merged, target=target):
            found = np.asarray(merged["w"], np.float64)
            return found @ target / np.linalg.norm(found) / np.linalg.norm(target)

        leads.append(cosine(ties(experts, base)) - cosine(task_arithmetic(experts, base)))
    assert np.mean(leads) >= 0.04
