import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import task_arithmetic
from subspace_jax.methods.merging.do_merging import do_merging, orthogonalize, pair_loss

from ...merging import trees
from ...tolerances import assert_rounding

SPLIT = functools.partial(do_merging, steps=0)


def loras(pairs, base):
    """Experts `[a, b]` of one matrix, as trees."""
    found = []
    for a, b in pairs:
        weight = sj.adapt(base, {"w": sj.lora(rank=a.shape[1], alpha=a.shape[1])}, key=jax.random.key(0))["w"]
        found.append(trees.with_leaf({"w": weight}, "w", a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32)))
    return found


def random_pairs(ranks, shape=(12, 10), seed=0):
    generator = np.random.default_rng(seed)
    return [(generator.normal(size=(shape[0], r)), generator.normal(size=(r, shape[1]))) for r in ranks]


def lengths(delta, granularity):
    axis = {"output": 0, "input": 1, "matrix": None}[granularity]
    return np.sqrt((delta**2).sum(axis=axis, keepdims=True))


def reference(deltas, granularity, scale=1.0, renormalize=False):
    sizes = [lengths(d, granularity) for d in deltas]
    ways = [np.where(m > 1e-6 * m.max(), d / np.where(m > 0, m, 1), 0) for d, m in zip(deltas, sizes, strict=True)]
    way = sum(ways) / len(deltas)
    if renormalize:
        n = lengths(way, granularity)
        way = np.where(n > 0, way / np.where(n > 0, n, 1), 0)
    return scale * sum(sizes) / len(deltas) * way


@pytest.mark.parametrize("granularity", ["output", "input", "matrix"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_split_equals_float64_numpy(granularity, renormalize, kind):
    base = {"w": jnp.zeros((12, 10))}
    pairs = random_pairs((2, 1, 3))
    pairs[1] = (pairs[1][0], pairs[1][1] * np.array([0.0] * 3 + [20.0] * 7))  # columns without an update
    pairs[2] = (pairs[2][0] * np.array([[0.0]] * 2 + [[1.0]] * 10), pairs[2][1])
    deltas = [a @ b for a, b in pairs]
    experts = loras(pairs, base) if kind == "lora" else [{"w": jnp.asarray(d, jnp.float32)} for d in deltas]
    merged = SPLIT(experts, base, granularity=granularity, renormalize=renormalize, scale=1.4)
    if kind == "lora":
        assert merged["w"].rank == 6
    expected = reference(deltas, granularity, 1.4, renormalize)
    assert_rounding(trees.arrays(merged)["w"], expected, size=12, dtype="float32")


@pytest.mark.parametrize("granularity", ["output", "input", "matrix"])
def test_identical_experts_and_rescaled_ones(granularity):
    base = {"w": jnp.zeros((12, 10))}
    ((a, b),) = random_pairs((3,))
    same = SPLIT(loras([(a, b)] * 4, base), base, granularity=granularity)
    assert_rounding(trees.arrays(same)["w"], a @ b, size=12, dtype="float32")
    # Three times the update: the direction is the same, the length is the mean of 1 and 3.
    scaled = SPLIT(loras([(a, b), (a, 3 * b)], base), base, granularity=granularity)
    assert_rounding(trees.arrays(scaled)["w"], 2 * a @ b, size=12, dtype="float32")


def test_equal_lengths_are_task_arithmetic():
    base = {"w": jnp.zeros((12, 10))}
    pairs = [(a / np.linalg.norm(a @ b), b) for a, b in random_pairs((2, 3))]
    experts = loras(pairs, base)
    found = SPLIT(experts, base, granularity="matrix", scale=2 * 0.3)
    expected = task_arithmetic(experts, base, weights=0.3)
    assert_rounding(trees.arrays(found)["w"], trees.arrays(expected)["w"], size=12, dtype="float32")


def test_updates_of_unequal_size_count_alike():
    """Orthogonal rank-one updates of norms 1, 4, 16: cosines with the sum, and with the merged update."""
    base = {"w": jnp.zeros((6, 5))}
    pairs = [(s * np.eye(6)[:, [i]], np.eye(5)[[i]]) for i, s in enumerate((1.0, 4.0, 16.0))]
    experts = loras(pairs, base)

    def cosines(merged):
        d = trees.arrays(merged)["w"]
        return [(d * (a @ b)).sum() / np.linalg.norm(d) / np.linalg.norm(a @ b) for a, b in pairs]

    np.testing.assert_allclose(cosines(task_arithmetic(experts, base)), np.array([1, 4, 16]) / np.sqrt(273), rtol=1e-5)
    np.testing.assert_allclose(cosines(SPLIT(experts, base, granularity="matrix")), 1 / np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(cosines(do_merging(experts, base, granularity="matrix")), 1 / np.sqrt(3), rtol=1e-5)


def test_an_untrained_expert_counts_but_has_no_direction():
    base = {"w": jnp.zeros((12, 10))}
    (pair,) = random_pairs((2,))
    experts = loras([pair, (pair[0], 0 * pair[1])], base)
    merged = do_merging(experts, base)  # the first stage leaves the only trained one as it is
    assert np.array_equal(orthogonalize(experts, base)[1]["w"].a, experts[1]["w"].a)
    expected = reference([pair[0] @ pair[1], np.zeros((12, 10))], "output")
    assert bool(jnp.isfinite(merged["w"].materialize()).all())
    assert_rounding(trees.arrays(merged)["w"], expected, size=12, dtype="float32")


def objective(delta, factors, gamma, power=2):
    factors = [f + d for f, d in zip(factors, delta, strict=True)]
    total = gamma * sum((d**2).sum() for d in delta)
    for i, one in enumerate(factors):
        for j, other in enumerate(factors):
            total += np.linalg.norm(one.T @ other) ** power if i != j else 0.0
    return total


@pytest.mark.parametrize("cosine", [0.3, 0.9])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_two_vectors_reach_the_minimum_that_scipy_finds(cosine, gamma):
    optimize = pytest.importorskip("scipy.optimize")
    a, b = np.zeros((6, 1)), np.zeros((6, 1))
    a[0], b[0], b[1] = 1.0, cosine, np.sqrt(1 - cosine**2)
    rights = [np.eye(5)[:1], np.eye(5)[1:2]]  # disjoint, so these stay
    base = {"w": jnp.zeros((6, 5))}
    moved = orthogonalize(loras([(a, rights[0]), (b, rights[1])], base), base, gamma=gamma)
    best = optimize.minimize(lambda v: objective(v.reshape(2, 6, 1), (a, b), gamma), 0.01 * np.ones(12)).fun
    delta = [np.asarray(m["w"].a, np.float64) - f for m, f in zip(moved, (a, b), strict=True)]
    assert objective(delta, (a, b), gamma) == pytest.approx(best, rel=0.01)
    assert all(np.array_equal(m["w"].b, r) for m, r in zip(moved, rights, strict=True))
    assert abs(delta[0][2:]).max() < 1e-6  # within the plane of the two


def test_pair_loss_falls_and_stays_where_there_is_none():
    pairs = random_pairs((4, 4, 2, 3), (64, 48))
    base = {"w": jnp.zeros((64, 48))}
    experts = loras(pairs, base)
    moved = orthogonalize(experts, base)

    def loss(trees_, field):
        factors = [np.asarray(t["w"].a if field == "a" else t["w"].b.T, np.float64) for t in trees_]
        factors = [f * np.sqrt(f.shape[1]) / np.linalg.norm(f) for f in factors]
        return objective([0 * f for f in factors], factors, 0.0)

    for field in "ab":
        assert loss(moved, field) < loss(experts, field) / 5
    assert [m["w"].rank for m in moved] == [4, 4, 2, 3]
    apart = loras([(np.eye(64)[:, [i]], np.eye(48)[[i]]) for i in range(3)], base)
    for before, after in zip(apart, orthogonalize(apart, base), strict=True):
        assert np.array_equal(before["w"].a, after["w"].a)
    held = orthogonalize(experts, base, gamma=1e4)
    assert_rounding(np.asarray(held[0]["w"].a), np.asarray(experts[0]["w"].a), size=200)
    first = orthogonalize(experts, base, power=1)
    assert loss(first, "a") < loss(experts, "a")


def test_pair_loss_is_the_closed_value():
    factors = [np.random.default_rng(i).normal(size=(5, 2)) for i in range(3)]
    closed = 2 * sum(np.linalg.norm(factors[i].T @ factors[j]) ** 2 for i in range(3) for j in range(i))
    assert float(pair_loss(jnp.asarray(np.stack(factors), jnp.float32))) == pytest.approx(closed, rel=1e-5)


def test_orthogonal_experts_go_into_any_merger():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.lora(rank=2), sj.lora(rank=3)])
    moved = orthogonalize(experts, base)
    merged = task_arithmetic(moved, base, weights=1.0)
    direct = do_merging(experts, base)
    assert merged["stack"].rank == direct["stack"].rank == 5
    again = SPLIT(moved, base)
    for path in ("dense", "wide", "stack"):
        assert_rounding(trees.arrays(again)[path], trees.arrays(direct)[path], size=12, dtype="float32")
    # Every layer of a stack by itself.
    layer = {"w": base["stack"][1]}
    weights = [e["stack"] for e in experts]
    single = do_merging(loras([(np.asarray(w.a[1]) * w.scale, np.asarray(w.b[1])) for w in weights], layer), layer)
    assert_rounding(trees.arrays(direct)["stack"][1], trees.arrays(single)["w"], size=100, dtype="float32")


def test_parallel_experts_warn():
    base = {"w": jnp.zeros((12, 10))}
    pairs = random_pairs((2, 2))
    with pytest.warns(UserWarning, match=r"w: two experts have nearly parallel factors \(cosine 1\.0000\)"):
        do_merging(loras([pairs[0], pairs[0]], base), base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        do_merging(loras(pairs, base), base)
        SPLIT(loras([pairs[0], pairs[0]], base), base)


def test_under_jit_without_a_second_compilation():
    base = {"w": jnp.zeros((12, 10))}
    count = 0

    @jax.jit
    def merge(experts, scale):
        nonlocal count
        count += 1
        return do_merging(experts, base, scale=scale)

    experts = loras(random_pairs((2, 3)), base)
    found = merge(experts, 1.0)
    merge(loras(random_pairs((2, 3), seed=5), base), 2.0)
    assert count == 1
    assert_rounding(trees.arrays(found)["w"], trees.arrays(do_merging(experts, base))["w"], size=100, dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, "granularity="),
        ({"steps": -1}, "steps=-1"),
        ({"gamma": -1.0}, "gamma="),
        ({"power": 3}, "power=3"),
        ({"learning_rate": 0.0}, "learning_rate="),
        ({"scale": float("nan")}, "scale="),
    ],
)
def test_bad_options_are_refused(options, message):
    base = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=f"do_merging: {message}"):
        do_merging([base, base], base, **options)
