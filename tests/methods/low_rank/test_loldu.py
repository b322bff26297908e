"""LoLDU against scipy's factorization: only the pivots move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import RankError
from tests.tolerances import tolerance

SHAPES = [(12, 7), (7, 12), (8, 8)]
STARTS = ["ldu", "uniform", "constant", "normal", "ones", "zeros", "s_uniform", "s_normal"]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, method, **kwargs):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0), **kwargs)


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"])


def scipy_factors(w, rank):
    """X, the pivots and Y of `[in, out]`, in float64."""
    permutation, lower, upper = scipy.linalg.lu(w.T.astype(np.float64))
    pivots = np.diag(upper)
    return (upper / pivots[:, None])[:rank].T, pivots[:rank], (permutation @ lower[:, :rank]).T


def moved(adapted, core):
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda _: jnp.asarray(core, jnp.float32), trainable), frozen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 7])
def test_factors_are_those_of_scipy(shape, rank):
    w = matrix(shape)
    weight = adapt(w, sj.loldu(rank))["w"]
    for found, expected in zip((weight.left, weight.core, weight.right), scipy_factors(w, rank), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_factors_are_those_of_elimination_by_hand():
    w = matrix((4, 4))
    rest, order, lower, upper = w.T.astype(np.float64), [0, 1, 2, 3], np.eye(4), np.zeros((4, 4))
    for i in range(4):
        best = i + int(np.argmax(np.abs(rest[i:, i])))
        for rows in (rest, lower[:, :i]):
            rows[[i, best]] = rows[[best, i]]
        order[i], order[best] = order[best], order[i]
        upper[i, i:] = rest[i, i:]
        for j in range(i + 1, 4):
            lower[j, i] = rest[j, i] / rest[i, i]
            rest[j] = rest[j] - lower[j, i] * rest[i]
    weight = adapt(w, sj.loldu())["w"]
    np.testing.assert_allclose(weight.core, np.diag(upper), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(weight.right)[:, order].T, lower, atol=1e-5)
    np.testing.assert_allclose(weight.left.T, upper / np.diag(upper)[:, None], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_factorization_is_the_weight_and_leaves_nothing(shape):
    w = matrix(shape)
    weight = adapt(w, sj.loldu())["w"]
    assert weight.scale == 1.0
    np.testing.assert_allclose((weight.left * weight.core) @ weight.right, w, atol=1e-5 * np.abs(w).max())
    assert weight.base is None
    assert weight.shape == shape
    np.testing.assert_allclose(weight.materialize(), w, atol=1e-5 * np.abs(w).max())
    kept = adapt(w, sj.loldu(residual_dtype=jnp.float32))["w"]
    np.testing.assert_allclose(kept.base, 0, atol=1e-5)
    assert adapt(w, sj.loldu(sigma=0.5))["w"].base is not None
    assert adapt(w, sj.loldu(start="ones"))["w"].base is not None


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_triangles_and_the_lower_one_is_small(shape):
    weight = adapt(matrix(shape), sj.loldu(5))["w"]
    left, right = np.asarray(weight.left), np.asarray(weight.right)
    np.testing.assert_allclose(np.tril(left[:5]), left[:5], atol=0)
    np.testing.assert_allclose(np.diag(left), 1, atol=tolerance(size=4))
    assert np.abs(right).max() <= 1.0
    pivot_columns = [
        next(j for j in range(shape[1]) if right[i, j] == 1 and not right[i + 1 :, j].any()) for i in range(5)
    ]
    np.testing.assert_array_equal(np.triu(right[:, pivot_columns]), right[:, pivot_columns])


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_a_schur_complement(shape):
    weight = adapt(matrix(shape), sj.loldu(3, sigma=1.0))["w"]
    base = np.asarray(weight.base)
    np.testing.assert_allclose(base[:3], 0, atol=1e-5)
    columns = np.flatnonzero(np.abs(base).max(axis=0) < 1e-5)
    assert len(columns) == 3
    # The pivot columns are those in which the lower triangle has its ones.
    assert all((np.asarray(weight.right)[:, columns] == 1).any(axis=0))


def test_product_of_pivots_is_the_determinant():
    w = matrix((6, 6))
    sign = np.linalg.det(scipy.linalg.lu(w.T)[0])
    found = float(jnp.prod(adapt(w, sj.loldu())["w"].core)) * sign
    np.testing.assert_allclose(found, np.linalg.det(w.astype(np.float64)), rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale", [{"sigma": 1.0}, {"alpha": 8.0}])
def test_every_start_is_the_weight_with_the_exact_residual(start, scale):
    w = matrix((12, 7))
    assert np.abs(dense(adapt(w, sj.loldu(4, start=start, **scale))) - w).max() <= 1e-5 * np.abs(w).max()


@pytest.mark.parametrize("start", STARTS[1:])
def test_published_residual_starts_elsewhere_by_the_change_of_the_pivots(start):
    w = matrix((12, 7))
    weight = adapt(w, sj.loldu(4, sigma=0.5, start=start, residual="ldu"))["w"]
    x, pivots, y = scipy_factors(w, 4)
    change = 0.5 * (x * (np.asarray(weight.core) - pivots)) @ y
    assert np.abs(change).max() > 0.1
    np.testing.assert_allclose(weight.materialize(), w + change, atol=1e-4)


def test_published_residual_of_the_pivots_themselves_is_exact():
    w = matrix((12, 7))
    np.testing.assert_allclose(dense(adapt(w, sj.loldu(4, residual="ldu"))), w, atol=1e-5)


def test_starts_have_their_distributions():
    w = matrix((400, 300)) + 2.0 * np.eye(400, 300, dtype=np.float32)
    cores = {s: np.asarray(adapt(w, sj.loldu(start=s))["w"].core) for s in STARTS}
    mean, spread = cores["ldu"].mean(), cores["ldu"].std()
    np.testing.assert_allclose(cores["constant"], mean, rtol=1e-4)
    np.testing.assert_array_equal(cores["ones"], 1)
    np.testing.assert_array_equal(cores["zeros"], 0)
    for name, bound in (("uniform", abs(mean) / 2), ("s_uniform", 1.0)):
        assert np.abs(cores[name]).max() <= bound
        np.testing.assert_allclose(cores[name].std(), bound / np.sqrt(3), rtol=0.1)
    assert abs(cores["normal"].mean() - mean) < 4 * spread / np.sqrt(300)
    np.testing.assert_allclose(cores["normal"].std(), spread, rtol=0.2)
    np.testing.assert_allclose(cores["s_normal"].std(), 1, rtol=0.2)


def test_scale_says_what_it_is():
    w = matrix((12, 7))
    found = [adapt(w, m)["w"].scale for m in (sj.loldu(), sj.loldu(4), sj.loldu(4, alpha=1), sj.loldu(7, alpha=1))]
    assert found == [1.0, 2.0, 0.25, 1 / 7]
    assert adapt(w, sj.loldu(4, sigma=3.0))["w"].scale == 3.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ["factored", "materialized", "auto"])
def test_gradient_is_the_diagonal_between_the_triangles(shape, route):
    w, x = matrix(shape), matrix((5, shape[0]), 1)
    trainable, frozen = sj.partition(adapt(w, sj.loldu(3, sigma=0.5, route=route)))
    apply = sj.with_adapters(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    found = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen), x)))(trainable)["w"].core
    left, _, right = scipy_factors(w, 3)
    np.testing.assert_allclose(found, 0.5 * np.diag(left.T @ (x.T @ np.cos(x @ w)) @ right.T), rtol=1e-3, atol=1e-3)


def test_only_the_pivots_learn():
    trainable, _ = sj.partition(adapt(matrix((12, 7)), sj.loldu(3)))
    assert [v.shape for v in jax.tree.leaves(trainable)] == [(3,)]
    params = {str(i): jax.ShapeDtypeStruct((768, 768), jnp.float32) for i in range(24)}
    whole = jax.eval_shape(lambda p: sj.adapt(p, {"*": sj.loldu(768)}, key=jax.random.key(0)), params)
    assert sj.summary(whole).trainable == 18_432


def fit(adapted, target, optimizer, steps):
    trainable, frozen = sj.partition(adapted)

    def step(carry, _):
        trainable, state = carry
        distance = lambda t: 0.5 * jnp.sum((sj.combine(t, frozen)["w"].materialize() - target) ** 2)
        updates, state = optimizer.update(jax.grad(distance)(trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    (trainable, _), _ = jax.lax.scan(step, (trainable, optimizer.init(trainable)), length=steps)
    return sj.combine(trainable, frozen)


def test_trajectory_of_the_weight_is_the_same_for_every_start():
    w, target = matrix((10, 6)), matrix((10, 6), 3)
    found = [dense(fit(adapt(w, sj.loldu(4, start=s)), target, optax.adam(1e-2), 50)) for s in STARTS]
    assert np.abs(found[0] - w).max() > 0.1
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], atol=1e-4 * np.abs(w).max())


def test_gradient_descent_reaches_least_squares():
    w, target = matrix((9, 6)), matrix((9, 6), 3)
    adapted = adapt(w, sj.loldu(4, sigma=0.5))
    x, pivots, y = scipy_factors(w, 4)
    pieces = 0.5 * np.einsum("ir,ro->ior", x, y).reshape(-1, 4)
    gram = 0.25 * (x.T @ x) * (y @ y.T)
    np.testing.assert_allclose(pieces.T @ pieces, gram, atol=1e-12)
    change = np.linalg.lstsq(pieces, (target - w).ravel(), rcond=None)[0]
    trained = fit(adapted, target, optax.sgd(float(1 / np.linalg.eigvalsh(gram)[-1])), 3000)
    np.testing.assert_allclose(trained["w"].core, pivots + change, rtol=1e-3, atol=1e-3)


def test_change_alone_is_a_lora_on_the_untouched_weight():
    w, x = matrix((12, 7)), matrix((5, 12), 1)
    adapted = adapt(w, sj.loldu(4, alpha=8.0))
    weight = adapted["w"]
    after = moved(adapted, weight.core + matrix((4,), 5))
    change = after["w"].core - weight.core
    as_lora = x @ w + weight.scale * ((x @ weight.left) * change) @ weight.right
    np.testing.assert_allclose(sj.with_adapters(lambda p, x: x @ p["w"])(after, x), as_lora, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 5])
def test_zero_pivots_spread_nothing(rank):
    w = matrix((8, 3)) @ matrix((3, 6), 1)
    w[:, 2] = 0
    weight = adapt(w, sj.loldu(rank, sigma=1.0))["w"]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(weight))
    np.testing.assert_array_equal(weight.core[3:], 1)
    np.testing.assert_allclose(weight.materialize(), w, atol=1e-5 * np.abs(w).max())
    zeros = adapt(np.zeros((5, 4), np.float32), sj.loldu())["w"]
    np.testing.assert_array_equal(zeros.core, 1)
    np.testing.assert_array_equal(zeros.materialize(), 0)
    x, _, y = (np.asarray(v) for v in (zeros.left, zeros.core, zeros.right))
    np.testing.assert_array_equal(x @ y, 0)


def test_every_layer_of_a_stack_by_itself():
    w = matrix((3, 9, 6))
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    weight = adapt(w, sj.loldu(4, sigma=1.0), roles=roles)["w"]
    for i in range(3):
        one = adapt(w[i], sj.loldu(4, sigma=1.0))["w"]
        np.testing.assert_allclose(weight.left[i], one.left, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weight.core[i], one.core, rtol=1e-4)
        np.testing.assert_allclose(weight.right[i], one.right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["window_channels", "channels_window"])
def test_order_of_a_convolution(order):
    w = matrix((3, 2, 4, 5))
    method = sj.loldu(4, sigma=1.0, convolution_order=order)
    weight = adapt(w, method, roles={"w": sj.Role.conv()})["w"]
    axes = (0, 1, 2) if order == "window_channels" else (2, 0, 1)
    x, pivots, y = scipy_factors(w.transpose(*axes, 3).reshape(24, 5), 4)
    found = np.asarray(weight.left).reshape(3, 2, 4, 4).transpose(*axes, 3).reshape(24, 4)
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weight.core, pivots, rtol=1e-4)
    np.testing.assert_allclose(weight.right, y, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(weight.materialize(), w, atol=1e-5)


def test_bfloat16_weight_is_factorized_in_float32():
    w = jnp.asarray(matrix((12, 7)), jnp.bfloat16)
    weight = adapt(w, sj.loldu(4))["w"]
    assert weight.base.dtype == weight.materialize().dtype == jnp.bfloat16
    assert weight.left.dtype == weight.core.dtype == weight.right.dtype == jnp.float32
    np.testing.assert_allclose(weight.core, scipy_factors(np.asarray(w, np.float32), 4)[1], rtol=1e-4)
    assert adapt(w, sj.loldu(4, residual_dtype=jnp.float32))["w"].base.dtype == jnp.float32


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match=r"w: loldu: rank=9 is above the weight's smaller side 6"):
        adapt(matrix((8, 6)), sj.loldu(9))
    with pytest.raises(ValueError, match="alpha=8 and sigma=1"):
        sj.loldu(4, alpha=8, sigma=1)
    for option in ("start", "residual", "convolution_order", "route"):
        with pytest.raises(ValueError, match=f"loldu: {option}='lu': expected one of"):
            sj.loldu(4, **{option: "lu"})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("route", ["auto", "factored"])
def test_low_precision_loses_what_the_formed_weight_loses(dtype, route):
    """Multiplied in bfloat16, the triangles of a 768 x 768 normal matrix lost 12 % of the output, formed 0.2 %."""
    size = 768
    w = jnp.asarray(matrix((size, size)) / np.sqrt(size), dtype)
    x = jnp.asarray(matrix((16, size), 1), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    adapted = sj.adapt({"w": w}, {"w": sj.loldu(route=route)}, key=jax.random.key(0))

    def lost(y):
        return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)

    found = lost(sj.with_adapters(lambda p, x: x @ p["w"])(adapted, x))
    assert found <= lost(x @ sj.merge(adapted)["w"]) * 1.01 < 2 * jnp.finfo(dtype).eps
    looked_up = sj.with_adapters(lambda p, i: p["w"][i])(adapted, jnp.arange(3))
    np.testing.assert_array_equal(looked_up, sj.merge(adapted)["w"][:3])
