"""Alignment and contrast against loops, their bounds, and maps that are trained with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import special_ortho_group

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.methods.regularized.lambda_orthogonality import (
    BackwardMap,
    ForwardMap,
    alignment_losses,
    compatibility_loss,
    contrastive_loss,
)
from tests.tolerances import tolerance


def features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def brute_force_contrast(left, right, labels, temperature):
    left, right = left.astype(np.float64), right.astype(np.float64)
    total = 0.0
    for i, row in enumerate(left):
        cosines = [row @ v / np.linalg.norm(row) / np.linalg.norm(v) / temperature for v in right]
        logs = np.array(cosines) - np.log(np.sum(np.exp(cosines)))
        positive = labels == labels[i]
        total -= logs[positive].sum() / positive.sum()
    return total / len(left)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("kind", ["some", "none", "all", "unlabeled"])
def test_contrast_is_that_of_a_loop(kind, temperature):
    left, right = features(9, 5), features(9, 5, seed=1)
    labels = {"some": np.array([0, 1, 0, 2, 2, 2, 1, 3, 0]), "all": np.zeros(9, int)}.get(kind, np.arange(9))
    given = None if kind == "unlabeled" else jnp.asarray(labels)
    found = contrastive_loss(left, right, given, temperature=temperature)
    np.testing.assert_allclose(found, brute_force_contrast(left, right, labels, temperature), rtol=1e-5)


def test_contrast_of_one_class_is_at_least_the_logarithm_of_the_batch():
    labels = jnp.zeros(16, jnp.int32)
    alike = jnp.ones((16, 3))
    np.testing.assert_allclose(contrastive_loss(alike, alike, labels), np.log(16), rtol=tolerance())
    for seed in range(20):
        found = contrastive_loss(features(16, 3, seed=seed), features(16, 3, seed=100 + seed), labels)
        assert found > np.log(16)


def test_contrast_knows_no_lengths_and_is_finite_at_zero():
    left, right = features(6, 4), features(6, 4, seed=1)
    expected = contrastive_loss(left, right)
    np.testing.assert_allclose(contrastive_loss(1e-3 * left, 1e4 * right), expected, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: contrastive_loss(v, right)))(jnp.asarray(left).at[0].set(0.0))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("old_width", [3, 5, 8])
def test_alignment_compares_the_coordinates_that_both_have(old_width):
    new, mapped, old = features(7, 5), features(7, 5, seed=1), features(7, old_width, seed=2)
    width = min(5, old_width)
    backward, forward = (new[:, :width] - old[:, :width]) ** 2, (mapped - new) ** 2
    summed = alignment_losses(new, mapped, old, reduction="sum")
    np.testing.assert_allclose(summed, (backward.sum(1).mean(), forward.sum(1).mean()), rtol=1e-5)
    mean = alignment_losses(new, mapped, old)
    np.testing.assert_allclose(mean, (backward.mean(), forward.mean()), rtol=1e-5)


def test_the_whole_loss_is_the_weighted_sum_of_its_parts():
    new, mapped, old, labels = features(7, 5), features(7, 5, seed=1), features(7, 3, seed=2), jnp.arange(7) % 3
    kernel = features(5, 5, seed=3)
    found = compatibility_loss(new, mapped, old, labels, kernel=kernel, lam=2.0, weights=(0.5, 2.0, 3.0, 0.25))
    aligned = alignment_losses(new, mapped, old)
    contrast = brute_force_contrast(mapped, new, labels, 0.1) + brute_force_contrast(mapped[:, :3], old, labels, 0.1)
    held = sj.lambda_orthogonality(kernel, 2.0)
    np.testing.assert_allclose(found[1:], (aligned.forward, aligned.backward, contrast, held), rtol=1e-5)
    expected = 0.5 * aligned.forward + 2 * aligned.backward + 3 * contrast + 0.25 * held
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    assert compatibility_loss(new, mapped, old).orthogonality == 0.0


def test_both_maps_learn_from_each_others_distance():
    new, mapped, old = features(7, 5), features(7, 5, seed=1), features(7, 5, seed=2)
    both = jax.jit(jax.grad(lambda a, b: alignment_losses(a, b, old).forward, (0, 1)))(new, mapped)
    np.testing.assert_allclose(both[0], -both[1], rtol=tolerance())
    assert np.abs(both[0]).max() > 0


def test_narrow_features_give_float32():
    narrow = [jnp.asarray(features(6, 4, seed=i), jnp.bfloat16) for i in range(3)]
    found = compatibility_loss(*narrow)
    assert all(v.dtype == jnp.float32 for v in found)
    wide = compatibility_loss(*(v.astype(jnp.float32) for v in narrow))
    np.testing.assert_allclose(found, wide, rtol=tolerance())


def fitter(loss, optimizer):
    """A function of parameters and a number of steps, compiled once for all numbers."""

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda params, steps: jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0])


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["orthogonal", "cayley"])
def test_a_strict_map_with_alignment_alone_finds_the_rotation(kind):
    turn = special_ortho_group.rvs(6, random_state=0)
    new = features(64, 6)
    old = (new.astype(np.float64) @ turn).astype(np.float32)
    adapter = BackwardMap(kind)
    params = adapter.init(jax.random.key(0), new)["params"]

    def loss(params):
        mapped = adapter.apply({"params": params}, new)
        return alignment_losses(mapped, mapped, old).backward

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    found = adapter.apply({"params": fitter(loss, optimizer)(params, 600)}, jnp.eye(6))
    expected = orthogonal_procrustes(new, old)[0]
    np.testing.assert_allclose(expected, turn, atol=1e-5)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.optimized
def test_a_relaxed_map_ends_near_its_lambda_and_the_term_in_the_loss_is_the_transformation():
    """What old features want is far from a rotation, so that the gate decides where the kernel stops."""
    new = features(64, 6)
    old = new @ np.diag([3.0, 3.0, 3.0, 0.1, 0.1, 0.1]).astype(np.float32)
    backward, forward = BackwardMap(), ForwardMap(6)
    params = {
        "backward": jax.jit(backward.init)(jax.random.key(0), new)["params"],
        "forward": jax.jit(forward.init)(jax.random.key(1), old)["params"],
    }

    def loss(params, kernel=None, lam=None):
        mapped = backward.apply({"params": params["backward"]}, new)
        adapted = forward.apply({"params": params["forward"]}, old)
        weights = (1.0, 1.0, 0.0, 10.0)
        return compatibility_loss(mapped, adapted, old, kernel=kernel, lam=lam, alpha=4.0, weights=weights).total

    def distance(params):
        w = np.asarray(params["backward"]["kernel"], np.float64)
        return np.linalg.norm(w.T @ w - np.eye(6))

    ends = []
    for lam in (1.0, 4.0):
        adam = optax.adam(1e-2)
        added = optax.chain(
            sj.methods.lambda_orthogonality.add_lambda_orthogonality(10.0, lam, 4.0, select="backward/kernel"), adam
        )
        # Few steps: at the gate's edge Adam makes different rounding grow.
        inside = fitter(lambda p, lam=lam: loss(p, p["backward"]["kernel"], lam), adam)(params, 30)
        fit = fitter(loss, added)
        beside = fit(params, 30)
        np.testing.assert_allclose(inside["backward"]["kernel"], beside["backward"]["kernel"], atol=1e-5)
        ends.append(distance(fit(params, 300)))
    free = distance(fitter(loss, optax.adam(1e-2))(params, 300))
    assert ends[0] < 1.5 < 2.5 < ends[1] < 4.5 < 10 < free


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(StructureError, match=r"mapped_old \(7, 3\)"):
        alignment_losses(features(7, 5), features(7, 3), features(7, 3))
    with pytest.raises(StructureError, match=r"old \(6, 3\)"):
        alignment_losses(features(7, 5), features(7, 5), features(6, 3))
    with pytest.raises(StructureError, match=r"labels \(6,\)"):
        contrastive_loss(features(7, 5), features(7, 5), jnp.zeros(6, jnp.int32))
    with pytest.raises(ValueError, match="reduction='none'"):
        alignment_losses(features(7, 5), features(7, 5), features(7, 3), reduction="none")
