import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import iso_c, knots, task_arithmetic, ties, tsv_m

from ..tolerances import assert_rounding
from . import trees

LORAS = [sj.lora(rank=2, alpha=3.0), sj.lora(rank=1), sj.lora(rank=3)]


def polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def tsv_reference(deltas, rank, scale=1.0, tolerance=1e-6):
    left, values, right = [], [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        real = [j for j in range(min(rank, len(s))) if s[j] > tolerance * s[0]]
        left.append(u[:, real])
        values.append(s[real])
        right.append(vt[real].T)
    return scale * polar(np.concatenate(left, 1)) @ np.diag(np.concatenate(values)) @ polar(np.concatenate(right, 1)).T


def iso_reference(deltas, tolerance=1e-6):
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    real = s > tolerance * s[0]
    return s[real].mean() * u[:, real] @ vt[real]


def deltas_of(base, experts, path):
    """Task matrices `[layers][experts]` in float64."""
    start, moved = trees.arrays(base)[path], [trees.arrays(e)[path] for e in experts]
    found = [m - start for m in moved]
    return [[d[i] for d in found] for i in range(3)] if path == "stack" else [found]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_equals_float64_numpy(kind, name):
    base = trees.base_tree()
    experts = trees.full_experts(base) if kind == "full" else trees.adapted_experts(base, LORAS)
    merged = {"tsv_m": tsv_m, "iso_c": iso_c}[name](experts, base, roles=trees.ROLES)
    for path in ("dense", "wide", "stack"):
        layers = deltas_of(base, experts, path)
        rank = max(1, min(layers[0][0].shape) // 3)
        found = [tsv_reference(d, rank) if name == "tsv_m" else iso_reference(d) for d in layers]
        change = np.stack(found) if path == "stack" else found[0]
        leaf = merged[path]
        if kind == "lora":
            assert isinstance(leaf, sj.weights.LowRank)
            result = np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
        else:
            result = np.asarray(leaf, np.float64) - np.asarray(base[path], np.float64)
        np.testing.assert_allclose(result, change, rtol=0, atol=3e-5 * max(1.0, np.abs(change).max()))
    if kind == "full":
        expected = np.mean([np.asarray(e["bias"], np.float64) for e in experts], axis=0)
        assert_rounding(np.asarray(merged["bias"]), expected)


def test_zero_singular_values_do_not_tilt_the_others():
    """Rank-one updates of orthogonal directions merge to their sum, whatever fills the null space."""
    generator = np.random.default_rng(0)
    u, v = (np.linalg.qr(generator.normal(size=(n, 3)))[0] for n in (12, 10))
    deltas = [(i + 1) * np.outer(u[:, i], v[:, i]) for i in range(3)]
    base = {"w": jnp.zeros((12, 10))}
    noise = 1e-9 * generator.normal(size=(12, 10))
    for extra in (0, noise):
        merged = tsv_m([{"w": jnp.asarray(d + extra, jnp.float32)} for d in deltas], base, tolerance=1e-5)
        np.testing.assert_allclose(merged["w"], sum(deltas), atol=1e-5)


def test_singular_values_of_tsv_are_those_of_the_tasks():
    base = {"w": jnp.zeros((12, 9))}
    experts = trees.full_experts(base, 3, size=1.0)
    merged = tsv_m(experts, base, scale=2.0)
    kept = np.sort(np.concatenate([np.linalg.svd(e["w"], compute_uv=False)[:3] for e in experts]))[::-1]
    np.testing.assert_allclose(np.linalg.svd(merged["w"], compute_uv=False), 2 * kept, rtol=1e-5)


def test_iso_is_flat_and_keeps_the_nuclear_norm():
    base = {"w": jnp.zeros((12, 9))}
    experts = trees.full_experts(base, 3, size=1.0)
    found = np.linalg.svd(iso_c(experts, base)["w"], compute_uv=False)
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
    total = np.linalg.svd(sum(np.asarray(e["w"], np.float64) for e in experts), compute_uv=False).sum()
    assert found.sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "mixed"])
def test_knots_with_a_linear_merger_changes_nothing(kind):
    base = trees.base_tree()
    experts = trees.full_experts(base) if kind == "full" else trees.adapted_experts(base, LORAS)
    if kind == "mixed":
        experts = [experts[0], trees.plain(experts[1]), *trees.adapted_experts(base, [sj.oft(block_size=2)])]
    mean = functools.partial(task_arithmetic, weights=0.4)
    found, expected = knots(experts, base, merger=mean, roles=trees.ROLES), mean(experts, base)
    for path in ("dense", "wide", "stack"):
        if kind == "lora":
            assert found[path].rank == min(6, found[path].shape[-1])
            assert found[path].base is base[path]
        one, other = trees.arrays(found)[path], trees.arrays(expected)[path]
        assert_rounding(one, other, size=20, dtype="float32")


def test_aligned_parts_keep_norms_and_share_an_orthonormal_basis():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, LORAS)
    seen = {}

    def look(parts, zeros):
        seen.update({p: [np.asarray(e[p].make().array) for e in parts] for p in ("dense", "wide")})
        return zeros

    knots(experts, base, merger=look)
    for path, parts in seen.items():
        deltas = deltas_of(base, experts, path)[0]
        assert sum((p**2).sum() for p in parts) == pytest.approx(sum((d**2).sum() for d in deltas), rel=1e-5)
        stacked = np.concatenate(parts)
        gram = stacked.T @ stacked  # orthogonal columns, as P S has
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4 * gram.max())


def test_knots_ties_equals_a_loop_over_the_shared_basis():
    base = {"w": jnp.zeros((8, 6))}
    experts = trees.full_experts(base, 3, size=1.0)
    deltas = [np.asarray(e["w"], np.float64) for e in experts]
    q = np.linalg.svd(np.concatenate(deltas), full_matrices=False)[2].T
    parts = [{"w": jnp.asarray(d @ q, jnp.float32)} for d in deltas]
    merged = np.asarray(ties(parts, {"w": jnp.zeros((8, 6))}, density=0.4)["w"], np.float64)
    found = knots(experts, base, merger=functools.partial(ties, density=0.4), scale=0.6)
    np.testing.assert_allclose(found["w"], 0.6 * merged @ q.T, atol=1e-5)


@pytest.mark.parametrize("merger", [tsv_m, iso_c, knots])
def test_under_jit(merger):
    base = trees.base_tree()
    for experts in (trees.full_experts(base), trees.adapted_experts(base, LORAS)):
        function = functools.partial(merger, roles=trees.ROLES)
        found, expected = trees.arrays(jax.jit(function)(experts, base)), trees.arrays(function(experts, base))
        for path in trees.SHAPES:
            assert_rounding(found[path], expected[path], size=20, dtype="float32")
