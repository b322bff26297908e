"""OFT against numpy: rotations of the inputs, and nothing else."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.linalg import cayley, cayley_neumann, skew
from tests.tolerances import tolerance


def matrix(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def turned(w, method, seed=1, scale=0.5):
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    moved = jax.tree.map(lambda v: v + jnp.asarray(matrix(v.shape, seed, scale)), trainable)
    return sj.combine(moved, frozen)


def reference(entries, size):
    """The block-diagonal rotation, entry by entry."""
    blocks = []
    for row in np.asarray(entries, np.float64):
        q, values = np.zeros((size, size)), iter(row)
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(values)
                q[j, i] = -q[i, j]
        blocks.append((np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q))
    return scipy.linalg.block_diag(*blocks)


@pytest.mark.parametrize(("shape", "size"), [((12, 5), 4), ((6, 9), 3), ((8, 8), 8), ((4, 3), 1)])
def test_merged_weight_is_the_rotated_one(shape, size):
    w = matrix(shape)
    adapted = turned(w, sj.oft(size))
    rotation = reference(adapted["w"].skew_entries, size)
    merged = np.asarray(sj.merge(adapted)["w"])
    np.testing.assert_allclose(merged, rotation @ w, atol=1e-5)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(shape[0]), atol=1e-5)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(merged.T @ merged, w.T @ w, atol=1e-4)
    np.testing.assert_allclose(np.linalg.svd(merged)[1], np.linalg.svd(w)[1], rtol=1e-5)


def test_starts_bitwise_at_the_weight():
    w = matrix((12, 5))
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.oft(4)}, key=jax.random.key(0))
    np.testing.assert_array_equal(sj.merge(adapted)["w"], w)


def test_block_of_two_is_a_plane_rotation():
    angle = 2 * np.arctan(0.3)
    found = cayley(skew(jnp.array([0.3]), 2))
    plane = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    np.testing.assert_allclose(found, plane, atol=tolerance(size=4))


def test_negated_entries_give_the_inverse():
    q = skew(jnp.asarray(matrix((10,))), 5)
    np.testing.assert_allclose(cayley(-q), np.asarray(cayley(q)).T, atol=1e-5)


@pytest.mark.parametrize("terms", [2, 3, 5])
def test_series_is_the_transform_up_to_the_power_left_out(terms):
    q = skew(jnp.asarray(matrix((3, 6), scale=0.3)), 4)
    left_out = np.eye(4) - np.stack([np.linalg.matrix_power(np.asarray(b), terms - 1) for b in q])
    np.testing.assert_allclose(cayley_neumann(q, terms), np.asarray(cayley(q)) @ left_out, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"terms": 5}, {"share_blocks": True}, {"magnitude": True}])
def test_dense_layer_runs_as_its_merged_weight_and_so_do_its_gradients(options):
    w, x = matrix((12, 5)), matrix((7, 3, 12), 2)
    adapted = turned(w, sj.oft(4, **options), scale=0.2)
    trainable, frozen = sj.partition(adapted)
    model = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]))
    through = jax.jit(jax.value_and_grad(lambda t: sj.with_adapters(model)(sj.combine(t, frozen), x)))(trainable)
    formed = jax.jit(jax.value_and_grad(lambda t: model({"w": sj.combine(t, frozen)["w"].materialize()}, x)))(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), through, formed)


@pytest.mark.parametrize("strides", [1, 2])
def test_convolution_runs_as_its_merged_kernel(strides):
    model = nn.Conv(6, (3, 2), strides=strides)
    x = jnp.asarray(matrix((2, 8, 7, 4)))
    params = model.init(jax.random.key(0), x)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)
    adapted = sj.adapt(params, {"kernel": sj.oft(4)}, key=jax.random.key(0), roles=sj.roles(fn, params, x))
    adapted["kernel"] = adapted["kernel"].map_fields(lambda n, v: v + 0.3 if n == "skew_entries" else v)
    rotation = reference(adapted["kernel"].skew_entries, 4)
    kernel = (rotation @ np.asarray(params["kernel"]).reshape(24, 6)).reshape(3, 2, 4, 6)
    np.testing.assert_allclose(
        sj.with_adapters(fn)(adapted, x), fn(params | {"kernel": jnp.asarray(kernel)}, x), atol=1e-4
    )


def test_tied_table_rotates_what_it_produces():
    w, x = matrix((12, 5)), matrix((7, 5), 2)
    adapted = turned(w, sj.oft(4))
    found = sj.with_adapters(lambda p, x: x @ p["w"].T)(adapted, x)
    np.testing.assert_allclose(found, x @ (reference(adapted["w"].skew_entries, 4) @ w).T, atol=1e-4)


def test_dropout_replaces_the_stated_number_of_blocks():
    w = np.eye(16, dtype=np.float32)
    adapted = turned(w, sj.oft(2, dropout=0.5))
    plain = np.asarray(adapted["w"].rotations())
    seen = set()
    for seed in range(6):
        blocks = np.asarray(sj.with_dropout(adapted, jax.random.key(seed))["w"].rotations())
        identity = [bool((b == np.eye(2)).all()) for b in blocks]
        assert sum(identity) == 4
        np.testing.assert_array_equal(blocks[~np.array(identity)], plain[~np.array(identity)])
        seen.add(tuple(identity))
    assert len(seen) > 1
    np.testing.assert_array_equal(adapted["w"].rotations(), plain)


def test_constrained_blocks_stay_within_their_radius():
    w, radius = matrix((12, 5)), 0.05
    adapted = sj.adapt({"w": jnp.asarray(w), "b": jnp.ones(2)}, {"w": sj.oft(4), "b": sj.full()}, key=jax.random.key(0))
    trainable, _ = sj.partition(adapted)
    optimizer = optax.chain(optax.sgd(1.0), sj.methods.oft.coft_projection(radius))
    state = optimizer.init(trainable)
    gradient = jax.tree.map(lambda v: jnp.asarray(matrix(v.shape, 3)), trainable)
    gradient["w"] = gradient["w"].map_fields(lambda n, v: v.at[2].multiply(1e-4))
    updates, _ = jax.jit(optimizer.update)(gradient, state, trainable)
    moved = optax.apply_updates(trainable, updates)
    norms = np.linalg.norm(np.asarray(skew(moved["w"].skew_entries, 4)), axis=(-2, -1))
    np.testing.assert_allclose(norms[:2], radius / np.sqrt(3), rtol=1e-5)
    assert norms[2] < 1e-3
    np.testing.assert_allclose(moved["w"].skew_entries[2], -gradient["w"].skew_entries[2], rtol=1e-5)
    np.testing.assert_allclose(moved["b"].value, 1 - gradient["b"].value, rtol=tolerance())
    with pytest.raises(ValueError, match="params"):
        optimizer.update(gradient, state)


def test_block_size_moves_to_the_nearest_divisor_with_a_warning():
    params = {"w": jnp.ones((12, 4))}
    with pytest.warns(UserWarning, match="5 does not divide the input size 12; blocks are 4"):
        adapted = sj.adapt(params, {"w": sj.oft(5)}, key=jax.random.key(0))
    assert sj.summary(adapted).trainable == 3 * 6
    assert sj.summary(sj.adapt(params, {"w": sj.oft(None, blocks=2)}, key=jax.random.key(0))).trainable == 2 * 15
    with pytest.raises(ValueError, match="give one of"):
        sj.oft(4, blocks=2)


def test_the_constraint_holds_inside_another_weight():
    adapted = sj.adapt({"w": jnp.eye(8)}, {"w": sj.dora(sj.oft(4))}, key=jax.random.key(0))
    trainable, _ = sj.partition(adapted)
    optimizer = optax.chain(optax.sgd(1.0), sj.methods.oft.coft_projection(1e-2))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), trainable)
    entries = updates["w"].direction.skew_entries
    np.testing.assert_allclose(np.sqrt(2) * np.linalg.norm(entries, axis=-1), 1e-2 / np.sqrt(2), rtol=1e-5)
