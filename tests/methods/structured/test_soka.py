"""SoKA against numpy: Kronecker terms of a weight, how many, and what becomes of them."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError
from subspace_jax.linalg import allocate_terms
from tests.tolerances import tolerance

STACK = {"w": sj.Role.dense((1,), (2,), (0,))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(terms, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return sum(np.kron(rng.normal(size=(size, size)), rng.normal(size=(size, size))) for _ in range(terms)).astype("f4")


def adapt(w, method, roles=None):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0), roles=roles)


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"])


def moved(adapted, seed=1):
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(
        jax.tree.map(lambda v: v + 0.1 * jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen
    )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 13)])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_starts_at_the_weight_with_its_leading_terms(shape, svd):
    w = normal(*shape)
    weight = adapt(w, sj.soka(terms=2, svd=svd))["w"]
    np.testing.assert_allclose(weight.materialize(), w, atol=1e-5)
    m, p, n, q = weight.split
    blocks = w.reshape(m, p, n, q).transpose(0, 2, 1, 3).reshape(m * n, p * q)
    s = np.linalg.svd(blocks, compute_uv=False)
    np.testing.assert_allclose(weight.sigma, s[:2], rtol=1e-3)
    # What is trained lives in the residual no more.
    np.testing.assert_allclose(np.linalg.norm(weight.base), np.sqrt((s[2:] ** 2).sum()), rtol=1e-3, atol=1e-5)


def test_effective_weight_is_the_sum_of_numpys_products():
    weight = moved(adapt(normal(12, 20), sj.soka(terms=3)))["w"]
    terms = zip(*(np.asarray(v) for v in (weight.sigma, weight.left, weight.right)), strict=True)
    expected = np.asarray(weight.base) + sum(s * np.kron(u, v) for s, u, v in terms)
    np.testing.assert_allclose(weight.materialize(), expected, atol=1e-5)
    x = normal(5, 12, seed=2)
    run = sj.with_adapters(lambda p, x: x @ p["w"])
    np.testing.assert_allclose(run({"w": weight}, x), x @ expected, atol=1e-4)


def test_no_array_of_the_weights_size_is_made_in_a_step():
    adapted = adapt(normal(64, 64), sj.soka(terms=2))
    trainable, frozen = sj.partition(adapted)

    def loss(trainable, frozen, x):
        return jnp.sum(sj.with_adapters(lambda p, x: x @ p["w"])(sj.combine(trainable, frozen), x) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, jnp.ones((3, 64))))
    made = [line for line in text.splitlines() if "f32[64,64] = " in line]
    assert all("stop_gradient" in line or "transpose" in line or "copy" in line for line in made), made


def test_splits_of_columns_and_rows_are_pissa():
    w = normal(6, 9)
    found = adapt(w, sj.soka(terms=3, split=(6, 1, 1, 9)))["w"]
    pissa = adapt(w, sj.pissa(3, svd="exact"))["w"]
    np.testing.assert_allclose(found.base, pissa.base, atol=1e-5)
    assert found.left.shape == (3, 6, 1)
    assert found.right.shape == (3, 1, 9)


def test_count_is_that_of_the_formula_and_of_the_published_setting():
    adapted = adapt(normal(12, 20), sj.soka(terms=3))
    m, p, n, q = adapted["w"].split
    assert sj.summary(adapted).trainable == sj.methods.soka.active_values(adapted) == 3 * (m * n + p * q + 1)
    params = {str(i): jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for i in range(121)}
    published = jax.eval_shape(
        lambda p: sj.adapt(p, {"*": sj.soka(terms=1, svd="exact")}, key=jax.random.key(0)), params
    )
    assert sj.summary(published).trainable == 991_353


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_automatic_terms_are_the_planted_ones(terms):
    w = planted(terms, size=8) + 1e-2 * normal(64, 64)
    weight = adapt(w, sj.soka(energy=0.99))["w"]
    assert weight.rank == terms
    np.testing.assert_allclose(weight.materialize(), w, atol=5e-5)


def test_automatic_terms_stay_within_bounds():
    assert adapt(normal(16, 16), sj.soka(energy=0.999, combine="energy"))["w"].rank == 8
    assert adapt(planted(1), sj.soka(least=3))["w"].rank == 3
    # The randomized decomposition knows the whole energy, of which eight terms hold a part only.
    assert adapt(normal(32, 32), sj.soka(energy=0.5, combine="energy", most=5, svd="randomized"))["w"].rank == 5


def test_stack_has_the_largest_number_of_terms_and_masks_the_rest():
    w = np.stack([planted(1), planted(3, seed=1)]) + 1e-3 * normal(2, 16, 16)
    adapted = adapt(w, sj.soka(energy=0.99), STACK)
    np.testing.assert_array_equal(adapted["w"].mask, [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(dense(adapted), w, atol=2e-5)
    assert sj.methods.soka.active_values(adapted) == 4 * 33
    gradient = jax.jit(jax.grad(lambda t, f: jnp.sum(sj.combine(t, f)["w"].materialize() ** 3)))(
        *sj.partition(adapted)
    )["w"]
    for part in (gradient.sigma, gradient.left, gradient.right):
        assert not np.asarray(part[0, 1:]).any()
        assert np.abs(np.asarray(part[1])).min(axis=tuple(range(1, part.ndim - 1))).max() > 0


def test_budget_is_spent_by_energy_per_value():
    params = {"a": normal(16, 16), "b": 3.0 * normal(16, 16, seed=1), "c": normal(2, 8, 16, seed=2)}
    roles = {"c": sj.Role.dense((1,), (2,), (0,))}
    budget = 500
    adapted = sj.adapt(params, {"*": sj.soka(budget=budget, most=20)}, key=jax.random.key(0), roles=roles)
    # By hand: repeatedly the next term with the most energy per value, over all four matrices.
    matrices = {("a", 0): params["a"], ("b", 0): params["b"], ("c", 0): params["c"][0], ("c", 1): params["c"][1]}
    spectra, costs = {}, {}
    for name, w in matrices.items():
        m, p, n, q = adapted[name[0]].split
        spectra[name] = np.linalg.svd(
            w.reshape(m, p, n, q).transpose(0, 2, 1, 3).reshape(m * n, p * q), compute_uv=False
        )
        costs[name] = m * n + p * q + 1
    kept = dict.fromkeys(matrices, 1)
    left = budget - sum(costs.values())
    while True:
        open_ = [n for n in kept if kept[n] < min(20, len(spectra[n]))]
        best = max(open_, key=lambda n: spectra[n][kept[n]] ** 2 / costs[n])
        if costs[best] > left:
            break
        kept[best] += 1
        left -= costs[best]
    found = {name: int(np.atleast_2d(adapted[name[0]].mask)[name[1]].sum()) for name in matrices}
    assert found == kept
    assert len(set(kept.values())) > 1
    assert sj.methods.soka.active_values(adapted) == budget - left <= budget
    np.testing.assert_allclose(sj.merge(adapted)["c"], params["c"], atol=2e-5)


def test_change_is_decomposed_on_the_untouched_weight():
    w, delta = normal(16, 16), planted(2) + 1e-3 * normal(16, 16, seed=3)
    adapted = sj.adapt({"w": w}, {"w": sj.soka(energy=0.99, delta={"w": delta})}, key=jax.random.key(0))
    assert adapted["w"].rank == 2
    np.testing.assert_array_equal(adapted["w"].base, w)
    np.testing.assert_allclose(dense(adapted), w + delta, atol=2e-2)
    assert np.abs(dense(adapted) - w - planted(2)).max() < 1e-2


def test_split_by_path_overrides_the_default():
    params = {"a": {"kernel": normal(16, 16)}, "b": {"kernel": normal(16, 16)}}
    method = sj.soka(terms=1, split={"a/*": (2, 8, 8, 2)})
    adapted = sj.adapt(params, {"**": method}, key=jax.random.key(0))
    assert adapted["a"]["kernel"].split == (2, 8, 8, 2)
    assert adapted["b"]["kernel"].split == (4, 4, 4, 4)


def test_pruning_keeps_the_function_and_a_compiled_step():
    w = np.stack([planted(3), planted(5, seed=1)])
    adapted = moved(adapt(w, sj.soka(terms=6), STACK))
    traces = []

    @jax.jit
    def step(adapted):
        traces.append(None)
        return jax.grad(lambda t, f: jnp.sum(sj.combine(t, f)["w"].materialize() ** 2))(*sj.partition(adapted))

    step(adapted)
    pruned = jax.jit(lambda tree: sj.methods.soka.prune_terms(tree, energy=0.8))(adapted)
    size = np.abs(dense(adapted)).max()
    np.testing.assert_allclose(dense(pruned), dense(adapted), atol=tolerance(size=4) * max(size, 1))
    gradient = step(pruned)["w"]
    assert len(traces) == 1
    weight, before = pruned["w"], adapted["w"]
    chex.assert_trees_all_equal_shapes_and_dtypes(weight, before)
    # By hand: the largest norms that hold the energy, and no more than before the elbow.
    for layer in range(2):
        parts = (np.asarray(v[layer]) for v in (before.sigma, before.left, before.right))
        norms = [np.linalg.norm(s * np.kron(u, v)) for s, u, v in zip(*parts, strict=True)]
        ranked = np.sort(norms)[::-1]
        energy = 1 + int(np.argmax(np.cumsum(ranked**2) >= 0.8 * np.sum(ranked**2)))
        x, y = np.arange(6) / 5, (ranked - ranked[-1]) / (ranked[0] - ranked[-1])
        kept = min(energy, max(int(np.argmax(1 - x - y)), 1))
        np.testing.assert_array_equal(weight.mask[layer], np.asarray(norms) >= ranked[kept - 1])
        dropped = np.asarray(weight.mask[layer]) == 0
        for part in (gradient.sigma, gradient.left, gradient.right):
            assert not np.asarray(part[layer])[dropped].any()
            assert np.asarray(part[layer])[~dropped].any()
    assert sj.methods.soka.active_values(pruned) == int(weight.mask.sum()) * 33 < sj.methods.soka.active_values(adapted)


def test_pruning_twice_counts_only_terms_in_use():
    adapted = moved(adapt(planted(5), sj.soka(terms=6)))
    once = sj.methods.soka.prune_terms(adapted, energy=0.999, combine="energy", most=4)
    twice = sj.methods.soka.prune_terms(once, energy=1.0, combine="energy")
    np.testing.assert_array_equal(once["w"].mask, twice["w"].mask)
    assert int(once["w"].mask.sum()) == 4
    # The elbow is looked for among those four, not among zeros.
    four = np.sort(np.asarray(once["w"].importance()))[::-1][:4]
    x, y = np.arange(4) / 3, (four - four[-1]) / (four[0] - four[-1])
    thrice = sj.methods.soka.prune_terms(once, combine="elbow")
    assert int(thrice["w"].mask.sum()) == max(int(np.argmax(1 - x - y)), 1)
    np.testing.assert_allclose(dense(thrice), dense(adapted), atol=2e-5)


def test_pruning_reaches_inside_other_weights():
    adapted = moved(adapt(planted(5), sj.dora(sj.soka(terms=6))))
    pruned = sj.methods.soka.prune_terms(adapted, energy=0.5)
    assert int(pruned["w"].direction.mask.sum()) < 6
    np.testing.assert_allclose(dense(pruned), dense(adapted), atol=2e-5)


def test_normalizing_moves_norms_into_the_scales():
    adapted = moved(adapt(normal(12, 20), sj.soka(terms=3)))
    trainable, frozen = sj.partition(adapted)
    again = sj.combine(sj.methods.soka.normalize_terms(trainable), frozen)
    np.testing.assert_allclose(dense(again), dense(adapted), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(again["w"].left, axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(again["w"].right, axis=(1, 2)), 1, rtol=1e-5)


def test_rewriting_on_the_original_weight_takes_twice_the_terms():
    params = {"w": normal(16, 16)}
    adapted = moved(adapt(params["w"], sj.soka(terms=3)))
    found = sj.methods.soka.to_kronecker(adapted, params)
    np.testing.assert_array_equal(found["w"].base, params["w"])
    assert found["w"].rank == 6
    np.testing.assert_allclose(dense(found), dense(adapted), atol=2e-5)
    pruned = moved(sj.methods.soka.prune_terms(adapted, energy=0.5), seed=5)
    np.testing.assert_allclose(dense(sj.methods.soka.to_kronecker(pruned, params)), dense(pruned), atol=5e-5)
    with pytest.raises(StructureError, match=r"w: params has an array of shape \(3, 3\)"):
        sj.methods.soka.to_kronecker(adapted, {"w": jnp.ones((3, 3))})


def test_a_larger_budget_never_takes_a_term_away():
    spectra, costs = [np.array([9.0, 6.0, 1.0]), np.array([8.0, 2.0, 1.5, 1.4])], [40, 9]
    found = [
        np.array([int(n) for n in allocate_terms(spectra, costs, budget, least=1, most=4)]) for budget in range(49, 200)
    ]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(found))
    assert found[0].tolist() == [1, 1]
    assert found[-1].tolist() == [3, 4]


def test_a_split_for_no_weight_is_refused():
    params = {"a": normal(8, 8), "b": normal(8, 8)}
    for split in ({"c": (2, 4, 2, 4)}, {"a": (2, 4, 2, 4), "x/*": (2, 4, 2, 4)}):
        with pytest.raises(PatternError, match=r"soka: split has .*which matches no weight of this method"):
            sj.adapt(params, {"*": sj.soka(1, split=split)}, key=jax.random.key(0))


def test_a_summary_leaves_masked_terms_out():
    wide = np.stack([np.kron(normal(4, 4, seed=i), normal(4, 4, seed=9 + i)) for i in range(2)])
    wide[1] += np.kron(normal(4, 4, seed=5), normal(4, 4, seed=6))
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    adapted = sj.adapt({"w": wide}, {"w": sj.soka(energy=0.9999, combine="energy")}, key=jax.random.key(0), roles=roles)
    used = int(adapted["w"].mask.sum())
    assert used < adapted["w"].mask.size
    assert sj.summary(adapted).trainable == used * 33 == sj.methods.soka.active_values(adapted)


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match=r"w: soka: 9 terms are wanted.*have 8 at most"):
        adapt(normal(8, 8), sj.soka(terms=9))
    with pytest.raises(RankError, match=r"w: soka: split=\(2, 3, 4, 2\) does not fit a weight from 8 to 8"):
        adapt(normal(8, 8), sj.soka(terms=1, split=(2, 3, 4, 2)))
    with pytest.raises(RankError, match="budget=3 is 14 values short of 1 term"):
        adapt(normal(8, 8), sj.soka(budget=3))
    with pytest.raises(RankError, match=r"soka: least=9: expected an int of at least 1 and at most 8"):
        sj.soka(least=9)
    with pytest.raises(RankError, match="both given"):
        sj.soka(2, budget=100)
    with pytest.raises(ValueError, match="combine='all'"):
        sj.soka(combine="all")
    with pytest.raises(StructureError, match=r"w: soka: delta has nothing here.*nearest paths are 'v'"):
        adapt(normal(8, 8), sj.soka(delta={"v": jnp.ones((8, 8))}))
    for method in (sj.soka(), sj.soka(budget=100)):
        with pytest.raises(RankError, match=r"w: soka: .*pass terms="):
            jax.eval_shape(lambda p, m=method: sj.adapt(p, {"w": m}, key=jax.random.key(0)), {"w": jnp.ones((4, 4))})
