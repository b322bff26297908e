import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError
from tests.tolerances import tolerance

RANK = 6


def matrix(shape=(40, 24), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, method, role=None, seed=0):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(seed), roles={"w": role} if role else None)


def exact(**options):
    return sj.pissa(RANK, svd="exact", **options)


def product(weight):
    return weight.scale * np.asarray(weight.a, np.float64) @ np.asarray(weight.b, np.float64)


@pytest.fixture(params=[(40, 24), (24, 40), (30, 30)], ids=str, scope="module")
def case(request):
    w = matrix(request.param)
    return w, adapt(w, exact(alpha=15.0))["w"], np.linalg.svd(w.astype(np.float64), full_matrices=False)


def test_the_product_is_the_truncated_decomposition(case):
    w, weight, (u, s, vt) = case
    np.testing.assert_allclose(product(weight), (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5 * s[0])
    error = np.linalg.norm(w - product(weight))
    assert abs(error / np.sqrt(np.sum(s[RANK:] ** 2)) - 1) < 1e-4


def test_the_residual_has_the_next_singular_value_as_its_norm(case):
    _, weight, (_, s, _) = case
    assert abs(np.linalg.norm(np.asarray(weight.base), 2) / s[RANK] - 1) < 1e-4


def test_the_factors_are_balanced(case):
    _, weight, (_, s, _) = case
    expected = np.diag(s[:RANK]) / weight.scale
    a, b = np.asarray(weight.a, np.float64), np.asarray(weight.b, np.float64)
    np.testing.assert_allclose(a.T @ a, expected, atol=1e-5 * s[0])
    np.testing.assert_allclose(b @ b.T, expected, atol=1e-5 * s[0])


def test_the_residual_is_orthogonal_to_the_factors(case):
    _, weight, (_, s, _) = case
    residual = np.asarray(weight.base, np.float64)
    assert np.abs(residual.T @ np.asarray(weight.a)).max() < 1e-5 * s[0] ** 1.5
    assert np.abs(residual @ np.asarray(weight.b).T).max() < 1e-5 * s[0] ** 1.5


def test_merge_and_forward_are_those_of_the_array(case):
    w, weight, _ = case
    assert np.abs(sj.merge({"w": weight})["w"] - w).max() <= 1e-5 * np.abs(w).max()
    x = matrix((5, w.shape[0]), seed=1)
    found = sj.with_adapters(lambda p, x: x @ p)(weight, jnp.asarray(x))
    np.testing.assert_allclose(found, x @ w, atol=1e-4)


def test_alpha_does_not_change_the_residual():
    w = matrix()
    one, two = (adapt(w, exact(alpha=alpha))["w"] for alpha in (6.0, 12.0))
    assert two.scale == 2 * one.scale
    np.testing.assert_allclose(one.base, two.base, atol=tolerance(size=4))
    np.testing.assert_allclose(one.a, np.sqrt(2) * two.a, rtol=1e-5)


def test_full_rank_leaves_no_residual():
    w = matrix((12, 8))
    weight = adapt(w, sj.pissa(8, svd="exact"))["w"]
    assert np.abs(weight.base).max() < 1e-5 * np.abs(w).max()


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_directions_beyond_the_rank_of_the_array_are_dead(svd):
    """Exactly: an array of zeros beside three independent columns, rank six."""
    w = np.zeros((40, 24), np.float32)
    w[:3, :3] = np.diag([3.0, 2.0, 1.0])
    weight = adapt(w, sj.pissa(RANK, svd=svd))["w"]
    assert not np.asarray(weight.a[:, 3:]).any()
    assert not np.asarray(weight.b[3:]).any()

    def loss(weight):
        return jnp.sum(sj.with_adapters(lambda w, x: jnp.tanh(x @ w))(weight, jnp.asarray(matrix((5, 40)))) ** 2)

    gradient = jax.jit(jax.grad(loss))(weight)
    assert np.asarray(gradient.a[:, :3]).any()
    assert not np.asarray(gradient.a[:, 3:]).any()
    assert not np.asarray(gradient.b[3:]).any()


def test_more_iterations_of_the_randomized_mode_approach_the_exact_one():
    w = matrix((60, 60))
    reference = product(adapt(w, exact())["w"])
    gaps = []
    for iterations in (0, 4, 32):
        weight = adapt(w, sj.pissa(RANK, iterations=iterations))["w"]
        gaps.append(np.linalg.norm(product(weight) - reference) / np.linalg.norm(reference))
        assert np.abs(sj.merge({"w": weight})["w"] - w).max() <= 1e-5 * np.abs(w).max()
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-2


@pytest.mark.parametrize(
    ("shape", "role", "to_matrices"),
    [
        ((3, 2, 5, 24), sj.Role.conv(), lambda w: w.reshape(1, 30, 24)),
        ((40, 3, 8), sj.Role.dense((0,), (1, 2)), lambda w: w.reshape(1, 40, 24)),
        ((5, 8, 24), sj.Role.dense((0, 1), (2,)), lambda w: w.reshape(1, 40, 24)),
        ((3, 40, 24), sj.Role.dense((1,), (2,), (0,)), lambda w: w),
        ((24, 40), sj.Role.dense((1,), (0,)), lambda w: w.T[None]),
    ],
    ids=["conv", "heads out", "heads in", "stacked", "transposed"],
)
def test_other_kernels_are_decomposed_as_matrices_from_inputs_to_outputs(shape, role, to_matrices):
    w = matrix(shape)
    weight = adapt(w, exact(), role)["w"]
    found = product(weight).reshape(-1, *product(weight).shape[-2:])
    for one, expected in zip(found, to_matrices(w), strict=True):
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        np.testing.assert_allclose(one, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5 * s[0])
    np.testing.assert_allclose(sj.merge({"w": weight})["w"], w, atol=1e-5)


def test_a_bfloat16_residual_is_off_by_its_last_place_and_a_float32_one_is_not():
    w = jnp.asarray(matrix(), jnp.bfloat16)
    wide = np.asarray(w, np.float32)
    narrow = adapt(w, exact())["w"]
    assert narrow.base.dtype == jnp.bfloat16
    error = np.abs(np.asarray(narrow.materialize(jnp.float32)) - wide)
    assert 0 < error.max() <= 2**-8 * np.abs(wide).max()
    kept = adapt(w, exact(residual_dtype=jnp.float32))["w"]
    assert kept.base.dtype == jnp.float32
    assert kept.dtype == jnp.bfloat16
    np.testing.assert_allclose(kept.materialize(jnp.float32), wide, atol=1e-5)


def test_narrow_factors_are_what_the_residual_is_taken_from():
    """Rounding of the factors is absorbed, so that the adapted weight still equals the array."""
    w = matrix()
    weight = adapt(w, exact(dtype=jnp.bfloat16))["w"]
    assert weight.a.dtype == weight.b.dtype == jnp.bfloat16
    assert np.abs(np.asarray(weight.materialize()) - w).max() <= 1e-5 * np.abs(w).max()


def test_the_residual_is_bit_identical_after_training():
    w, x = matrix(), jnp.asarray(matrix((16, 40), seed=1))
    adapted = adapt(w, exact())
    trainable, frozen = sj.partition(adapted)
    before = np.array(frozen["w"].base)
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(trainable, frozen, state):
        def loss(trainable):
            return jnp.mean(sj.with_adapters(lambda p, x: x @ p["w"])(sj.combine(trainable, frozen), x) ** 2)

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), frozen, state

    state = tx.init(trainable)
    for _ in range(5):
        trainable, frozen, state = step(trainable, frozen, state)
    np.testing.assert_array_equal(frozen["w"].base, before)
    assert not np.allclose(trainable["w"].a, adapted["w"].a, atol=1e-3)


def trained(adapted, seed=3):
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen)


class TestToLora:
    @pytest.mark.parametrize("alpha", [None, 15.0])
    def test_it_is_exact_for_arbitrary_factors(self, alpha):
        w = matrix()
        adapted = trained(adapt(w, exact(alpha=alpha)))
        expected = np.asarray(adapted["w"].base, np.float64) + product(adapted["w"])
        converted = sj.to_lora(adapted, {"w": jnp.asarray(w)})["w"]
        np.testing.assert_array_equal(converted.base, w)
        assert (converted.a.shape, converted.b.shape) == ((40, 2 * RANK), (2 * RANK, 24))
        assert converted.scale == adapted["w"].scale
        assert converted.start_a is None
        np.testing.assert_allclose(np.asarray(w, np.float64) + product(converted), expected, atol=1e-4)
        x = matrix((5, 40), seed=1)
        apply = sj.with_adapters(lambda p, x: x @ p)
        np.testing.assert_allclose(apply(converted, jnp.asarray(x)), x @ expected, rtol=1e-3, atol=1e-2)

    def test_at_the_start_it_changes_nothing(self):
        w = matrix()
        converted = sj.to_lora(adapt(w, exact()), {"w": jnp.asarray(w)})
        np.testing.assert_allclose(sj.merge(converted)["w"], w, atol=tolerance(size=4))

    def test_dora_over_pissa_and_stacked_layers_convert_too(self):
        params = {"w": jnp.asarray(matrix((3, 40, 24)))}
        role = sj.Role.dense((1,), (2,), (0,))
        adapted = trained(adapt(params["w"], sj.dora(exact()), role))
        converted = sj.to_lora(adapted, params)
        np.testing.assert_array_equal(converted["w"].direction.base, params["w"])
        np.testing.assert_allclose(sj.merge(converted)["w"], sj.merge(adapted)["w"], atol=1e-4)

    def test_other_leaves_stay(self):
        params = {"w": jnp.asarray(matrix()), "v": jnp.asarray(matrix()), "bias": jnp.ones(3)}
        adapted = sj.adapt(params, {"w": exact(), "v": sj.lora(2)}, key=jax.random.key(0))
        converted = sj.to_lora(adapted, params)
        chex.assert_trees_all_equal(converted["v"], adapted["v"])
        assert converted["bias"] is adapted["bias"]

    def test_another_tree_is_refused(self):
        adapted = adapt(matrix(), exact())
        with pytest.raises(StructureError, match="w: params has nothing"):
            sj.to_lora(adapted, {"v": jnp.ones((40, 24))})
        with pytest.raises(StructureError, match=r"an array of shape \(24, 40\)"):
            sj.to_lora(adapted, {"w": jnp.ones((24, 40))})


def test_the_start_is_kept_apart_from_what_learns():
    """Another buffer, so that a step may donate the trainable tree."""
    weight = adapt(matrix(), exact())["w"]
    np.testing.assert_array_equal(weight.a, weight.start_a)
    assert weight.a.unsafe_buffer_pointer() != weight.start_a.unsafe_buffer_pointer()
    trainable, frozen = sj.partition(weight)
    assert trainable.start_a is None
    assert frozen.start_b is not None
    assert dataclasses.replace(weight).trainable == ("a", "b")


def test_the_same_input_gives_the_same_adapter():
    first, second = (adapt(matrix(), sj.pissa(RANK))["w"] for _ in range(2))
    np.testing.assert_array_equal(first.a, second.a)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(RankError, match=r"w: .*rank=25 is above .* 24"):
        adapt(matrix(), sj.pissa(25))
    with pytest.raises(RankError, match=r"pissa: rank=0: expected an int of at least 1"):
        sj.pissa(0)
    with pytest.raises(ValueError, match="'full'"):
        sj.pissa(4, svd="full")


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_rank_above_that_of_the_weight_is_said_at_adapt(svd):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20)), jnp.float32)
    with pytest.warns(UserWarning, match=r"pissa: a weight of shape \(30, 20\) has a matrix of rank 3, below rank=8"):
        adapt(w, sj.pissa(8, svd=svd))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(w, sj.pissa(3, svd=svd))
        adapt(matrix(), sj.pissa(8, svd=svd))


def test_weights_that_are_no_lora_are_refused_by_to_lora():
    params = {"w": jnp.asarray(matrix())}
    for method, what in (
        (sj.oft(4), "Rotated of 'oft' is no low-rank addition"),
        (sj.loca(3), "CosineSpectrum of 'loca' is no low-rank addition"),
        (sj.dora(sj.oft(4)), r"Magnitude of 'dora\(oft\)' is no low-rank addition"),
        (sj.qpissa(2), "qpissa stands on a NF4, not on the original array"),
        (sj.o_lora(2, tasks=2), "stands on a .*, not on the original array"),
    ):
        adapted = sj.adapt(params, {"w": method}, key=jax.random.key(0))
        with pytest.raises(StructureError, match=f"w: to_lora: .*{what}"):
            sj.to_lora(adapted, params)
    for method in (sj.lora(2), sj.full(), sj.dora(sj.pissa(2))):
        adapted = sj.adapt(params, {"w": method}, key=jax.random.key(0))
        np.testing.assert_allclose(sj.merge(sj.to_lora(adapted, params))["w"], params["w"], atol=1e-5)
