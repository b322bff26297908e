"""LIFT against numpy: which entries learn, and that only those move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError, RoleError
from subspace_jax.weights import SparseBlocks
from tests.tolerances import tolerance

SHAPES = [(12, 7), (7, 12), (8, 8)]


def matrix(shape, seed=0):
    """Singular values have gaps, so that every fit is unique."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return ((u * 1.5 ** -np.arange(min(shape))) @ vt).astype(np.float32)


def adapt(w, method, **options):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0), **options)


def mask(w, method):
    found = np.zeros(w.size, bool)
    found[np.asarray(adapt(w, method)["w"].indices)] = True
    return found.reshape(w.shape)


def fit(w, rank):
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_selects_the_largest_entries_of_the_low_rank_fit(shape, svd):
    w = matrix(shape)
    weight = adapt(w, sj.lift(2, filter_rank=3, svd=svd))["w"]
    k = 2 * sum(shape)
    indices = np.asarray(weight.indices)
    assert indices.shape == (k,)
    assert (np.diff(indices) > 0).all()
    scores = np.abs(fit(w, 3)).ravel()
    assert set(indices) == set(np.argpartition(-scores, k - 1)[:k])
    assert scores[indices].min() >= np.delete(scores, indices).max()
    np.testing.assert_array_equal(weight.values, w.ravel()[indices])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_at_the_weight_bit_for_bit(dtype):
    w = jnp.asarray(matrix((12, 7)), dtype)
    adapted = adapt(w, sj.lift(2, filter_rank=3))
    assert adapted["w"].values.dtype == jnp.float32
    np.testing.assert_array_equal(sj.merge(adapted)["w"], w)


def test_full_filter_rank_is_plain_magnitude_and_rank_one_the_product_of_magnitudes():
    w = matrix((9, 6))
    k = 9 + 6
    largest = np.argsort(-np.abs(w).ravel(), kind="stable")[:k]
    assert set(np.flatnonzero(mask(w, sj.lift(1, filter_rank=6)))) == set(largest)
    u, v = np.linspace(-3, 2, 9), np.linspace(0.3, 2, 6) ** 2
    expected = np.argsort(-np.abs(np.outer(u, v)).ravel(), kind="stable")[:k]
    assert set(np.flatnonzero(mask(np.outer(u, v).astype(np.float32), sj.lift(1, filter_rank=1)))) == set(expected)


def test_selection_differs_from_magnitude_residual_and_smallest():
    w, k = matrix((12, 7)), 19
    found = set(np.flatnonzero(mask(w, sj.lift(1, filter_rank=2))))
    for scores in (np.abs(w), np.abs(w - fit(w, 2)), -np.abs(fit(w, 2)), fit(w, 2)):
        assert found != set(np.argsort(-scores.ravel())[:k])


def test_selection_ignores_sign_scale_and_transposition():
    w, method = matrix((12, 7)), sj.lift(1, filter_rank=2)
    found = mask(w, method)
    for other in (-w, 4.0 * w, 0.25 * w):
        np.testing.assert_array_equal(mask(other, method), found)
    np.testing.assert_array_equal(mask(np.ascontiguousarray(w.T), method), found.T)


def test_equal_scores_are_taken_in_row_major_order():
    w = np.ones((4, 4), np.float32)
    assert adapt(w, sj.lift(1, filter_rank=1))["w"].indices.shape == (8,)
    blocks = np.kron(np.eye(2), np.ones((2, 2))).astype(np.float32)  # a rank-2 fit is exact
    assert set(np.asarray(adapt(blocks, sj.lift(1, filter_rank=2))["w"].indices)) == {0, 1, 4, 5, 10, 11, 14, 15}


def test_layers_of_a_stack_and_windows_of_a_convolution():
    w = np.stack([matrix((8, 6), seed) for seed in range(3)])
    stacked = adapt(w, sj.lift(1, filter_rank=2), roles={"w": sj.Role.dense((1,), (2,), (0,))})["w"]
    for layer in range(3):
        np.testing.assert_array_equal(stacked.indices[layer], adapt(w[layer], sj.lift(1, filter_rank=2))["w"].indices)
    kernel = matrix((18, 5), 3).reshape(3, 3, 2, 5)
    conv = adapt(kernel, sj.lift(1, filter_rank=2), roles={"w": sj.Role.conv()})["w"]
    np.testing.assert_array_equal(conv.indices, adapt(kernel.reshape(18, 5), sj.lift(1, filter_rank=2))["w"].indices)


def test_blocks_train_their_own_largest_entries():
    w, (rows, cols) = np.stack([matrix((12, 8), seed) for seed in range(2)]), (3, 2)
    method = sj.lift(1, filter_rank=2, blocks=(rows, cols))
    weight = adapt(w, method, roles={"w": sj.Role.dense((1,), (2,), (0,))})["w"]
    k = -(-20 // 6)
    assert weight.indices.shape == weight.values.shape == (2, rows, cols, k)
    for layer, row, col in np.ndindex(2, rows, cols):
        block = np.s_[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        scores = np.abs(fit(w[layer], 2))[block].ravel()
        found = np.asarray(weight.indices[layer, row, col])
        assert (np.diff(found) > 0).all()
        assert set(found) == set(np.argsort(-scores)[:k])
        np.testing.assert_array_equal(weight.values[layer, row, col], w[layer][block].ravel()[found])
    np.testing.assert_array_equal(weight.materialize(), w)


def test_one_block_is_the_published_selection():
    w = matrix((12, 7))
    whole, published = (adapt(w, sj.lift(1, filter_rank=2, **o))["w"] for o in ({"blocks": (1, 1)}, {}))
    assert not isinstance(whole, SparseBlocks)
    np.testing.assert_array_equal(whole.indices, published.indices)


def test_blocks_are_selected_anew_and_take_their_moments_along():
    w, method = matrix((12, 8)), sj.lift(1, filter_rank=2, blocks=(2, 2))
    adapted, optimizer = adapt(w, method), optax.adam(1e-2)
    trainable, _ = sj.partition(adapted)
    ones = jax.tree.map(jnp.ones_like, trainable)
    _, state = optimizer.update(ones, optimizer.init(trainable), trainable)
    moved = dataclasses.replace(adapted["w"], values=adapted["w"].values * -3.0)
    new, state = sj.methods.lift.reselect_principal({"w": moved}, state, method, key=jax.random.key(1))
    np.testing.assert_allclose(sj.merge(new)["w"], moved.materialize(), rtol=tolerance())
    old, now, moments = (np.asarray(v) for v in (moved.indices, new["w"].indices, state[0].mu["w"].values))
    assert now.shape == old.shape
    assert (old != now).any(), "nothing was selected anew, so the test shows nothing"
    for place in np.ndindex(2, 2):
        np.testing.assert_allclose(
            moments[place], np.where(np.isin(now[place], old[place]), 0.1, 0.0), rtol=tolerance()
        )


def test_entries_that_were_never_selected_stay_bit_for_bit():
    w, method = matrix((12, 7)), sj.lift(1, filter_rank=2)
    adapted, optimizer = adapt(w, method), sj.methods.lift.lift_adam(3e-2)
    state = optimizer.init(sj.partition(adapted)[0])
    x, y = matrix((20, 12), 1), matrix((20, 7), 2)
    ever = np.zeros(w.size, bool)
    apply = sj.with_adapters(lambda p: jnp.mean((x @ p["w"] - y) ** 2))
    slope = jax.jit(jax.grad(lambda t, f: apply(sj.combine(t, f))))
    for step in range(1, 25):
        ever[np.asarray(adapted["w"].indices)] = True
        trainable, frozen = sj.partition(adapted)
        gradients = slope(trainable, frozen)
        updates, state = optimizer.update(gradients, state, trainable)
        adapted = sj.combine(optax.apply_updates(trainable, updates), frozen)
        if sj.methods.lift.refresh_due(step, 6):
            adapted, state = sj.methods.lift.reselect_principal(adapted, state, method, key=jax.random.key(step))
    changed = np.asarray(sj.merge(adapted)["w"]).ravel() != w.ravel()
    assert not changed[~ever].any()
    assert ever.sum() > 19, "the selection never moved, so the test shows nothing"
    assert changed[ever].mean() > 0.9


def test_count_is_that_of_the_published_setting():
    """LLaMA-2-7B, budget 128: 4.75 % of its 6.74e9 parameters."""
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = {"*": sj.lift(128, filter_rank=64, svd="randomized")}
    adapted = jax.eval_shape(lambda p: sj.adapt(p, rules, key=jax.random.key(0)), params)
    count = sum(w.values.size for w in jax.tree.leaves(adapted, is_leaf=sj.core.is_weight))
    assert count == 128 * sum(sum(s) for s in shapes.values())
    assert round(100 * 32 * count / 6.738e9, 2) == 4.75


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_filter_rank_above_the_smaller_side_is_cut_off(svd):
    """One rule over matrices of several shapes: where the fit is the weight, its largest entries learn."""
    params = {"wide": matrix((12, 40)), "narrow": matrix((12, 7))}
    adapted = sj.adapt(params, {"*": sj.lift(1, filter_rank=10, svd=svd)}, key=jax.random.key(0))
    chosen = np.zeros(12 * 7, bool)
    chosen[np.asarray(adapted["narrow"].indices)] = True
    magnitudes = np.abs(params["narrow"]).ravel()
    assert magnitudes[chosen].min() >= magnitudes[~chosen].max() - 1e-5
    assert adapted["wide"].count == 52


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match="filter_rank=0"):
        sj.lift(1, filter_rank=0)
    with pytest.raises(ValueError, match="svd='fast'"):
        sj.lift(1, filter_rank=1, svd="fast")
    with pytest.raises(RankError, match="an entry of blocks=0"):
        sj.lift(1, filter_rank=1, blocks=(2, 0))
    with pytest.raises(RoleError, match=r"w: lift: blocks=\(4, 2\) do not divide a matrix of 12 inputs and 7 outputs"):
        adapt(matrix((12, 7)), sj.lift(1, filter_rank=2, blocks=(4, 2)))
