import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.weights import quantize_nf4
from tests.tolerances import tolerance

LEVELS = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


def nearest(matrix, order="out_in"):
    """Rounds a matrix block by block to the nearest level, trying all sixteen."""
    levels = np.asarray(LEVELS, np.float32)
    flat = (matrix.T if order == "out_in" else matrix).astype(np.float32).reshape(-1)
    rounded = np.empty_like(flat)
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        scale = np.abs(block).max() or np.float32(1.0)
        index = np.abs(block[:, None] / scale - levels).argmin(axis=1)
        rounded[start : start + 64] = levels[index] * scale
    return rounded.reshape(matrix.T.shape).T if order == "out_in" else rounded.reshape(matrix.shape)


@pytest.mark.parametrize("order", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(16, 8), (32, 20), (7, 5), (1, 3)], ids=str)
def test_every_entry_is_rounded_to_the_nearest_level_of_its_block(shape, order):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized = quantize_nf4(jnp.asarray(w), order=order)
    assert quantized.shape == shape
    np.testing.assert_allclose(quantized.materialize(), nearest(w, order), rtol=tolerance())
    blocks = -(-w.size // 64)
    assert (quantized.codes.shape, quantized.absmax.shape) == ((32 * blocks,), (blocks,))
    assert quantized.codes.dtype == jnp.uint8


def test_the_order_of_entries_matters():
    w = np.random.default_rng(0).normal(size=(32, 20)).astype(np.float32)
    assert (nearest(w, "out_in") != nearest(w, "in_out")).any()
    default = quantize_nf4(jnp.asarray(w)).materialize()
    np.testing.assert_allclose(default, nearest(w, "out_in"), rtol=tolerance())


def test_levels_are_kept_and_rounding_twice_changes_nothing():
    w = np.tile(np.asarray(LEVELS, np.float32) * 3.0, 8).reshape(16, 8)
    np.testing.assert_allclose(quantize_nf4(jnp.asarray(w)).materialize(), w, rtol=tolerance())
    once = quantize_nf4(jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)).materialize()
    np.testing.assert_array_equal(quantize_nf4(once).materialize(), once)


def test_two_codes_share_a_byte_the_first_in_the_low_half():
    w = np.zeros((64, 1), np.float32)
    w[0], w[1] = 1.0, -1.0
    quantized = quantize_nf4(jnp.asarray(w))
    assert int(quantized.codes[0]) == 15 + (0 << 4)
    assert set(np.asarray(quantized.codes[1:]).tolist()) == {7 + (7 << 4)}


def test_a_block_of_zeros_stays_zero():
    w = np.random.default_rng(2).normal(size=(64, 3)).astype(np.float32)
    w[:, 1] = 0.0
    quantized = quantize_nf4(jnp.asarray(w))
    assert quantized.absmax.tolist()[1] == 1.0
    np.testing.assert_array_equal(quantized.materialize()[:, 1], 0.0)
    np.testing.assert_allclose(quantized.materialize(), nearest(w), rtol=tolerance())


@pytest.mark.parametrize(
    ("shape", "role"),
    [
        ((3, 16, 12), sj.Role.dense((1,), (2,), (0,))),
        ((4, 3, 10), sj.Role.dense((2,), (0, 1))),
        ((3, 2, 4, 6), sj.Role.conv()),
        ((16, 3, 12), sj.Role.dense((0,), (2,), (1,))),
    ],
    ids=str,
)
def test_other_roles_are_quantized_matrix_by_matrix(shape, role):
    w = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    quantized = quantize_nf4(jnp.asarray(w), role)
    assert quantized.shape == shape
    matrices = np.asarray(role.matrix(jnp.asarray(w)))
    expected = np.stack([nearest(m) for m in matrices.reshape(-1, *matrices.shape[-2:])]).reshape(matrices.shape)
    np.testing.assert_allclose(role.matrix(quantized.materialize()), expected, rtol=tolerance())


def test_a_reshaped_weight_stands_for_the_reshaped_array():
    w = jnp.asarray(np.random.default_rng(4).normal(size=(8, 12)), jnp.float32)
    quantized = quantize_nf4(w)
    moved = quantized.reshape((8, 3, 4))
    assert moved.shape == (8, 3, 4)
    np.testing.assert_array_equal(moved.materialize(), quantized.materialize().reshape(8, 3, 4))
    apply = sj.with_adapters(lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(8, 3, 4)))
    np.testing.assert_allclose(
        apply(quantized, jnp.ones((2, 8))), moved.materialize().sum(0)[None].repeat(2, 0), rtol=1e-5
    )


def test_a_bfloat16_array_comes_back_in_its_dtype():
    w = jnp.asarray(np.random.default_rng(5).normal(size=(16, 8)), jnp.bfloat16)
    quantized = quantize_nf4(w)
    assert quantized.materialize().dtype == quantized.dtype == jnp.bfloat16
    expected = nearest(np.asarray(w, np.float32))
    np.testing.assert_allclose(quantized.materialize(jnp.float32), expected, rtol=tolerance())


def test_nothing_of_it_learns():
    trainable, _ = sj.partition(quantize_nf4(jnp.ones((16, 8))))
    assert not jax.tree.leaves(trainable)
