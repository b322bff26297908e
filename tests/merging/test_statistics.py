import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import average, fisher, regmean

from ..tolerances import assert_rounding
from . import trees


def inputs_of(shape, count=3, rows=40, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(rows, shape[0])) for _ in range(count)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_solves_least_squares(kind, off_diagonal):
    base = trees.base_tree()
    methods = [sj.lora(rank=r) for r in (1, 2, 3)]
    experts = trees.full_experts(base) if kind == "full" else trees.adapted_experts(base, methods)
    xs = inputs_of(trees.SHAPES["dense"])
    merged = regmean(
        experts, base, [{"dense": jnp.asarray(x.T @ x, jnp.float32)} for x in xs], off_diagonal=off_diagonal
    )
    grams = [x.T @ x for x in xs]
    grams = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    moved = [trees.arrays(e)["dense"] for e in experts]
    expected = np.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, moved, strict=True)))
    found = trees.arrays(merged)["dense"]
    if kind == "lora":
        assert merged["dense"].rank == 6
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
    if off_diagonal == 1.0:
        gradient = sum(x.T @ (x @ found - x @ w) for x, w in zip(xs, moved, strict=True))
        assert np.abs(gradient).max() < 1e-3
    for path in ("wide", "bias", "stack"):
        expected = np.mean([trees.arrays(e)[path] for e in experts], axis=0)
        assert_rounding(trees.arrays(merged)[path], expected, dtype="float32", size=2)


def test_regmean_with_equal_grams_is_the_average_and_so_are_dead_inputs():
    base = trees.base_tree()
    experts = trees.full_experts(base)
    expected = np.asarray(average(experts)["dense"])
    same = regmean(experts, base, [{"dense": jnp.eye(12)}] * 3)
    assert_rounding(np.asarray(same["dense"]), expected, size=12)
    alive = jnp.diag(jnp.array([0.0] * 4 + [1.0] * 8))
    dead = regmean(experts, base, [{"dense": (i + 1) * alive} for i in range(3)])
    np.testing.assert_allclose(dead["dense"][:4], expected[:4], atol=1e-4)
    nothing = regmean(experts, base, [{"dense": jnp.zeros((12, 12))}] * 3)
    assert_rounding(np.asarray(nothing["dense"]), expected, size=12)


def test_statistics_of_capture_serve():
    base = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
    experts = trees.full_experts(base, 2)
    batches = [[np.random.default_rng(i).normal(size=(20, 6)).astype(np.float32)] for i in range(2)]
    captured = [sj.capture(lambda p, x: x @ p["w"], base, xs) for xs in batches]
    merged = regmean(experts, base, captured, off_diagonal=1.0)
    grams = [x[0].T.astype(np.float64) @ x[0] for x in batches]
    expected = np.linalg.solve(
        sum(grams), sum(g @ np.asarray(e["w"], np.float64) for g, e in zip(grams, experts, strict=True))
    )
    np.testing.assert_allclose(merged["w"], expected, atol=1e-4)


def test_fisher_equals_the_weighted_mean_and_small_information_is_not_lost():
    base = trees.base_tree()
    experts = trees.full_experts(base)
    keys = jax.random.split(jax.random.key(9), 3)
    information = [{p: jax.random.uniform(k, s) for p, s in trees.SHAPES.items()} for k in keys]
    merged = fisher(experts, base, information)
    for path in trees.SHAPES:
        weights = [np.asarray(f[path], np.float64) + 1e-6 for f in information]
        moved = [np.asarray(e[path], np.float64) for e in experts]
        assert_rounding(
            np.asarray(merged[path]), sum(w * m for w, m in zip(weights, moved, strict=True)) / sum(weights)
        )
    for level in (0.0, 1e-10, 1e-8):
        same = fisher([experts[0]] * 2, base, [{p: jnp.full(s, level) for p, s in trees.SHAPES.items()}] * 2)
        assert_rounding(np.asarray(same["dense"]), np.asarray(experts[0]["dense"]))


def test_statistics_may_be_constants_of_a_trace():
    base = trees.base_tree()
    experts = trees.full_experts(base, 2)
    statistics = [{"dense": jnp.full(trees.SHAPES["dense"], level)} for level in (1.0, 3.0)]
    traced = jax.jit(lambda experts: fisher(experts, base, statistics))(experts)
    np.testing.assert_allclose(traced["dense"], fisher(experts, base, statistics)["dense"], rtol=1e-6)


def test_bad_statistics_are_refused_by_path():
    base = trees.base_tree()
    experts = trees.full_experts(base, 2)
    good = {"dense": jnp.eye(12)}
    with pytest.raises(sj.errors.StatisticsError, match=r"dense: expert 1 has nothing .* expected shape \(12, 12\)"):
        regmean(experts, base, [good, {}])
    with pytest.raises(sj.errors.StatisticsError, match=r"dense: expert 1 has an array of shape \(3, 3\)"):
        regmean(experts, base, [good, {"dense": jnp.eye(3)}])
    with pytest.raises(sj.errors.StatisticsError, match="dense: the gram of expert 0 holds NaN"):
        regmean(experts, base, [{"dense": jnp.full((12, 12), jnp.nan)}, good])
    shape = trees.SHAPES["dense"]
    with pytest.raises(sj.errors.StatisticsError, match=r"dense: the squared_gradient of expert 1 has negative .* -3"):
        fisher(experts, base, [{"dense": jnp.ones(shape)}, {"dense": jnp.ones(shape).at[0, 0].set(-3.0)}])
    with pytest.raises(sj.errors.StructureError, match="one mapping for each of 2 experts"):
        fisher(experts, base, good)  # pyright: ignore
