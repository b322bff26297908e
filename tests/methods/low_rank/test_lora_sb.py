"""LoRA-SB and LoRA-XS against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError, StatisticsError, StructureError
from tests.tolerances import tolerance

SHAPES = [(12, 7), (7, 12), (8, 8)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loss(params, x):
    return jnp.mean(jnp.sin(x @ params["w"]) ** 2)


def full_gradient(w, x):
    z = x @ w
    return x.T @ (2 * np.sin(z) * np.cos(z)) / z.size


def start(w, batches, method):
    params = {"w": jnp.asarray(w)}
    stats = sj.capture(loss, params, batches, statistics=("gradient",))
    return sj.adapt(params, {"w": method}, key=jax.random.key(0), stats=stats)


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("update", ["sign", "raw"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_sb_starts_at_the_best_approximation_of_the_first_update(shape, update, alpha):
    w, batches = matrix(shape), [matrix((5, shape[0]), s) for s in (1, 2)]
    adapted = start(w, batches, sj.lora_sb(3, learning_rate=0.01, alpha=alpha, update=update))
    mean = np.mean([full_gradient(w, x) for x in batches], axis=0)
    step = -0.01 * (np.sign(mean) if update == "sign" else mean)
    u, s, vt = np.linalg.svd(step, full_matrices=False)
    np.testing.assert_allclose(dense(adapted) - w, (u[:, :3] * s[:3]) @ vt[:3], atol=tolerance(size=4))
    weight = adapted["w"]
    np.testing.assert_allclose(weight.left.T @ weight.left, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(weight.right @ weight.right.T, np.eye(3), atol=1e-5)
    np.testing.assert_array_equal(weight.base, w)


@pytest.mark.parametrize("shape", SHAPES)
def test_xs_takes_the_leading_directions_with_values_on_the_input_side(shape):
    w = matrix(shape)
    weight = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.methods.lora_sb.lora_xs(3, noise=0.0)}, key=jax.random.key(0))[
        "w"
    ]
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(weight.left.T @ weight.left, np.diag(s[:3] ** 2), atol=1e-3)
    np.testing.assert_allclose(weight.left @ weight.right, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-3)
    np.testing.assert_array_equal(dense({"w": weight}), w)


def test_xs_starts_within_its_noise():
    w = matrix((12, 7))
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.methods.lora_sb.lora_xs(3)}, key=jax.random.key(0))
    difference = np.abs(dense(adapted) - w).max()
    assert 0 < difference <= 1e-4 * np.linalg.svd(w)[1][0]


def test_random_factors_have_the_bounds_of_their_fan_in():
    w = matrix((400, 300))
    adapted = sj.adapt(
        {"w": jnp.asarray(w)}, {"w": sj.methods.lora_sb.lora_xs(16, factors="random")}, key=jax.random.key(0)
    )
    for factor, fan_in in ((adapted["w"].left, 400), (adapted["w"].right, 16)):
        bound = fan_in**-0.5
        assert 0.98 * bound < np.abs(factor).max() <= bound
        np.testing.assert_allclose(np.std(factor), bound / 3**0.5, rtol=0.03)


def test_steps_on_the_core_are_projected_steps_on_the_weight():
    w, x = matrix((6, 5)), matrix((9, 6), 1)
    adapted = start(w, [x], sj.lora_sb(2, learning_rate=0.01, alpha=3.0))
    weight = adapted["w"]
    scale, left, right = weight.scale, np.asarray(weight.left), np.asarray(weight.right)
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(loss)
    current = dense(adapted).astype(np.float64)
    slope = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen), x)))
    for _ in range(5):
        gradient = slope(trainable)
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, gradient)
        current -= 0.1 * scale**2 * left @ left.T @ full_gradient(current, x) @ right.T @ right
        np.testing.assert_allclose(dense(sj.combine(trainable, frozen)), current, atol=1e-5)
    change = current - w
    np.testing.assert_allclose(change, left @ left.T @ change @ right.T @ right, atol=tolerance(size=4))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_optimal_core_gradient_solves_least_squares(shape):
    w, full = matrix(shape), matrix(shape, 4)
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.methods.lora_sb.lora_xs(2, alpha=5.0)}, key=jax.random.key(0))
    weight = adapted["w"]
    scale, left, right = weight.scale, np.asarray(weight.left), np.asarray(weight.right)
    trainable, _ = sj.partition(adapted)
    plain = jax.tree.map(lambda _: jnp.asarray(scale * left.T @ full @ right.T), trainable)
    optimizer = sj.methods.lora_sb.scale_by_lora_sb(adapted)
    found, _ = jax.jit(optimizer.update)(plain, optimizer.init(trainable))
    design = scale * np.kron(left, right.T)
    best = np.linalg.lstsq(design, full.ravel(), rcond=None)[0].reshape(2, 2)
    np.testing.assert_allclose(found["w"].core, best, rtol=1e-3, atol=1e-4)


def test_optimal_core_gradient_is_the_identity_for_lora_sb_and_leaves_the_rest():
    w, x = matrix((6, 5)), matrix((9, 6), 1)
    adapted = start(w, [x], sj.lora_sb(2, learning_rate=0.01)) | {"bias": jnp.ones(3)}
    trainable, _ = sj.partition(adapted)
    optimizer = optax.chain(sj.methods.lora_sb.scale_by_lora_sb(adapted), optax.sgd(1.0))
    updates, _ = optimizer.update(trainable, optimizer.init(trainable))
    np.testing.assert_allclose(updates["w"].core, -trainable["w"].core, rtol=1e-5, atol=tolerance(size=4))
    assert updates["bias"] is None


@pytest.mark.parametrize(("rank", "thousands"), [(4, 1.5), (8, 6.1), (12, 13.8), (16, 24.6), (20, 38.4), (25, 60.0)])
def test_counts_are_the_published_ones(rank, thousands):
    kernels = [(1024, 1024), (1024, 1024), (1024, 1024), (4096, 1024)] * 24
    params = {str(i): jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(kernels)}
    adapted = jax.eval_shape(
        lambda p: sj.adapt(p, {"*": sj.methods.lora_sb.lora_xs(rank)}, key=jax.random.key(0)), params
    )
    count = sj.summary(adapted).trainable
    assert count == 96 * rank**2
    assert round(count / 1000, 1) == thousands


def test_zero_gradient_gives_a_still_start():
    x = np.zeros((5, 8), np.float32)
    adapted = start(matrix((8, 8)), [x], sj.lora_sb(2, learning_rate=0.1))
    np.testing.assert_array_equal(adapted["w"].core, 0)
    assert np.isfinite(adapted["w"].left).all()


def test_bad_input_is_refused_by_name():
    with pytest.raises(StatisticsError, match="w: lora_sb needs gradient"):
        sj.adapt({"w": jnp.ones((4, 4))}, {"w": sj.lora_sb(2, learning_rate=0.1)}, key=jax.random.key(0))
    with pytest.raises(RankError, match="w: lora_xs: rank=5 is above"):
        sj.adapt({"w": jnp.ones((4, 6))}, {"w": sj.methods.lora_sb.lora_xs(5)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="update"):
        sj.lora_sb(2, learning_rate=0.1, update="adam")


def test_a_tree_without_cores_of_its_own_is_refused():
    adapted = sj.adapt({"w": jnp.eye(8)}, {"w": sj.dora(sj.methods.lora_sb.lora_xs(2))}, key=jax.random.key(0))
    with pytest.raises(StructureError, match="inside another weight"):
        sj.methods.lora_sb.scale_by_lora_sb(adapted)


def test_a_gradient_of_zero_is_said_at_adapt():
    params = {"w": jnp.ones((2, 6, 4))}
    gradient = jnp.zeros((2, 6, 4)).at[0].set(1.0)
    stats = {"w": sj.core.Statistics(gradient=gradient)}
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    method = sj.lora_sb(2, learning_rate=1e-3)
    with pytest.warns(UserWarning, match=r"lora_sb: .*\(2, 6, 4\) the gradient of 1 of its layers is exactly zero"):
        sj.adapt(params, {"w": method}, key=jax.random.key(0), stats=stats, roles=roles)
