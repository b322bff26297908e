"""OSF's split against numpy's decomposition, its ranks against the published policies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StatisticsError

SHAPES = [(12, 8), (8, 12), (7, 7)]
STACK = {"w": sj.Role.dense((1,), (2,), (0,))}


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, preserved, roles=None, **options):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": sj.osf(preserved, **options)}, key=jax.random.key(0), roles=roles)


def dense(adapted):
    return np.asarray(sj.merge(adapted)["w"], np.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", ["exact", "bucketed", "common"])
def test_every_split_is_the_weight_and_counts_add_up(shape, width):
    w, q = matrix(shape), min(shape)
    for k in (0, 1, q // 2, q):
        adapted = adapt(w, k, width=width)
        assert np.abs(dense(adapted) - w).max() < 1e-5 * np.abs(w).max()
        if width == "exact":
            assert sj.summary(adapted).trainable == (q - k) * (sum(shape) + 1)
            assert adapted["w"].high_left.shape[-1] == k


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("width", ["exact", "bucketed"])
def test_where_nothing_is_frozen_no_matrix_of_zeros_is_multiplied(width, rows):
    w, x = matrix((6, 2, 4)), matrix((rows, 6), 1)
    roles = {"w": sj.Role.dense((0,), (1, 2))}
    free, padded = (adapt(w, 0, roles, width=one, route="auto") for one in (width, "common"))
    assert free["w"].base is None
    assert free["w"].live is None
    assert free["w"].shape == w.shape

    def loss(trainable, frozen):
        return jnp.sum(
            jnp.sin(sj.with_adapters(lambda p: jnp.einsum("ni,iab->nab", x, p["w"]))(sj.combine(trainable, frozen)))
        )

    (value, gradient), (expected, wanted) = (
        jax.jit(jax.value_and_grad(loss))(*sj.partition(one)) for one in (free, padded)
    )
    np.testing.assert_allclose(value, np.sin(np.einsum("ni,iab->nab", x, w)).sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(expected, value, rtol=1e-4, atol=1e-4)
    for name in ("left", "core", "right"):
        np.testing.assert_allclose(getattr(gradient["w"], name), getattr(wanted["w"], name), atol=1e-4)


def test_a_step_with_nothing_frozen_multiplies_factors_alone():
    d = 64
    adapted = adapt(matrix((d, d)), 0)
    found = jax.jit(sj.with_adapters(lambda p, x: x @ p["w"])).lower(adapted, jnp.ones((1, d))).compile()
    assert found.cost_analysis()["flops"] < 1.05 * 2 * d * (d + d)


def test_a_weight_without_full_rank_is_split_too():
    w = matrix((12, 3)) @ matrix((3, 8), 1)
    for k in (2, 3, 5):
        np.testing.assert_allclose(dense(adapt(w, k)), w, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_those_of_numpys_decomposition(shape):
    w = matrix(shape)
    weight = adapt(w, 3)["w"]
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(weight.base, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(weight.core, s[3:], rtol=1e-4)
    np.testing.assert_allclose(np.asarray(weight.high_left @ weight.high_left.T), u[:, :3] @ u[:, :3].T, atol=1e-5)
    np.testing.assert_allclose(np.asarray(weight.high_right.T @ weight.high_right), vt[:3].T @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(np.asarray(weight.left @ weight.left.T), u[:, 3:] @ u[:, 3:].T, atol=1e-5)


def test_common_width_masks_what_is_frozen_and_has_one_shape_for_all_ranks():
    w = matrix((12, 8))
    shapes = {str(jax.tree.map(jnp.shape, adapt(w, k, width="common"))) for k in range(9)}
    assert len(shapes) == 1
    adapted = adapt(w, 5, width="common")
    gradient = jax.jit(jax.grad(lambda t, f: jnp.sum(jnp.sin(sj.combine(t, f)["w"].materialize()))))(
        *sj.partition(adapted)
    )["w"]
    for part in (gradient.left[:, :5], gradient.core[:5], gradient.right[:5]):
        np.testing.assert_array_equal(part, 0)
    exact = jax.jit(jax.grad(lambda t, f: jnp.sum(jnp.sin(sj.combine(t, f)["w"].materialize()))))(
        *sj.partition(adapt(w, 5))
    )
    np.testing.assert_allclose(gradient.left[:, 5:], exact["w"].left, atol=1e-5)


def test_a_stream_of_growing_ranks_compiles_once():
    traces = []

    @jax.jit
    def loss(adapted, x):
        traces.append(None)
        return jnp.sum(sj.with_adapters(lambda p, x: x @ p["w"])(adapted, x))

    for k in (0, 2, 4, 8):
        loss(adapt(matrix((12, 8)), k, width="common"), jnp.ones((3, 12)))
    assert len(traces) == 1


@pytest.mark.parametrize("width", ["exact", "bucketed", "common"])
def test_layers_of_a_stack_have_ranks_of_their_own(width):
    w = matrix((3, 8, 6))
    ranks = np.array([1, 4, 6])
    adapted = adapt(w, {"w": ranks}, STACK, width=width)
    np.testing.assert_allclose(dense(adapted), w, atol=1e-5)
    weight = adapted["w"]
    for i, k in enumerate(ranks):
        u = np.linalg.svd(w[i])[0]
        left = np.asarray(weight.high_left[i])
        np.testing.assert_allclose(left @ left.T, u[:, :k] @ u[:, :k].T, atol=1e-5)
        assert int(weight.live[i].sum()) == 6 - k
    assert weight.left.shape[-1] == (6 if width == "common" else 5)


def test_buckets_hold_the_exact_factors_between_few_zeros():
    w = matrix((40, 32))
    shapes = {}
    for k in range(33):
        exact, found = adapt(w, k)["w"], adapt(w, k, width="bucketed")["w"]
        for name, axis in (("high_left", -1), ("high_right", -2), ("left", -1), ("core", -1), ("right", -2)):
            part, expected = np.asarray(getattr(found, name)), np.asarray(getattr(exact, name))
            first = part.shape[axis] - expected.shape[axis] if name in ("left", "core", "right") else 0
            places = range(first, first + expected.shape[axis])
            assert 0 <= part.shape[axis] - expected.shape[axis] < 32 // 8
            np.testing.assert_array_equal(np.take(part, places, axis), expected)
            np.testing.assert_array_equal(np.delete(part, places, axis), 0)
        live = np.ones(found.core.shape) if found.live is None else found.live
        np.testing.assert_array_equal(live, np.arange(len(live)) >= len(live) - (32 - k))
        shapes[k] = str(jax.tree.map(jnp.shape, found))
    assert len(set(shapes.values())) == 8 + 9  # between multiples of an eighth, and at them
    assert shapes[5] == shapes[6] == shapes[7] != shapes[8]


def test_bfloat16_weights_keep_float32_factors():
    w = jnp.asarray(matrix((12, 8)), jnp.bfloat16)
    weight = adapt(w, 3)["w"]
    assert weight.dtype == jnp.bfloat16
    assert weight.left.dtype == weight.high_left.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weight.high_left).T @ weight.left, 0, atol=1e-5)


def test_constants_fractions_functions_and_the_schedule():
    w = matrix((12, 8))
    rank = lambda preserved: adapt(w, preserved)["w"].high_left.shape[-1]
    assert [rank(p) for p in (0.5, 0.3, 1.0, 3, 0)] == [4, 2, 8, 3, 0]
    assert [rank(sj.methods.osf.schedule(t, 4)) for t in (1, 2, 3, 4)] == [0, 2, 4, 6]
    t5 = lambda t: lambda inputs, outputs: int(0.07 * t * max(inputs, outputs))
    assert [rank(t5(t)) for t in (1, 4, 9, 14)] == [0, 3, 7, 8]


def test_a_fraction_that_binary_numbers_miss_still_gives_its_rank():
    assert [adapt(matrix((10, 10)), (t - 1) / 10)["w"].high_left.shape[-1] for t in range(1, 11)] == list(range(10))


def test_importance_is_the_mean_cosine_of_rows():
    v, w, x = matrix((6, 6)), matrix((6, 9), 1), matrix((5, 4, 6), 2)
    params = {"v": jnp.asarray(v), "w": jnp.asarray(w), "bias": jnp.zeros(9)}
    traces, options = [], {"programs": {}}

    def fn(p, x):
        traces.append(1)
        return jnp.tanh(x @ p["v"]) @ p["w"] + p["bias"]

    options["roles"] = sj.roles(fn, params, jnp.asarray(x[:3]))
    traces.clear()
    sj.methods.osf.importance(fn, params, [jnp.asarray(x[:3])], **options)
    found = sj.methods.osf.importance(fn, params, [jnp.asarray(x[:3]), jnp.asarray(x[3:])], **options)
    assert len(traces) == 2  # of two shapes, in two calls
    hidden = np.tanh(x @ v)

    def cosine(a, b):
        return np.mean(np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

    assert set(found) == {"v", "w"}
    np.testing.assert_allclose(found["v"], cosine(x, x @ v), rtol=1e-4)
    np.testing.assert_allclose(found["w"], cosine(hidden, (hidden @ w)[..., :6]), rtol=1e-4)


def test_importance_of_scanned_layers_is_by_layer():
    w, x = matrix((3, 6, 6)), matrix((5, 6), 2)

    def fn(p, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, p["w"])[0]

    found = sj.methods.osf.importance(fn, {"w": jnp.asarray(w)}, [jnp.asarray(x)])["w"]
    for i, h in enumerate([x, np.tanh(x @ w[0]), np.tanh(np.tanh(x @ w[0]) @ w[1])]):
        y = h @ w[i]
        expected = np.mean(np.sum(h * y, -1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(y, axis=-1))
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)


def test_without_a_positive_mean_every_layer_keeps_the_target_share():
    """Cosines of inputs and outputs are negative in most random networks; ranks stay inside 1..q for all of them."""
    params = {"v": jnp.zeros((10, 30)), "w": jnp.zeros((10, 10))}
    with pytest.warns(UserWarning, match="mean importance is -0.1"):
        found = sj.methods.osf.ranks({"v": 0.1, "w": -0.3}, params, target=0.6)
    assert (found["v"], found["w"]) == (6, 6)
    found = sj.methods.osf.ranks({"v": 0.3, "w": -0.2}, params)  # mean 0.05: ratios 4.3 and -2.7
    assert (found["v"], found["w"]) == (10, 1)


def test_ranks_follow_importance():
    params = {"v": jnp.zeros((20, 20)), "w": jnp.zeros((3, 20, 30)), "u": jnp.zeros((20, 20))}
    importance = {"v": 0.2, "w": np.array([0.1, 0.4, 0.2])}
    found = sj.methods.osf.ranks(importance, params, roles=STACK)
    mean = 0.9 / 4
    assert found["v"] == round((0.1 + 0.2 / mean * 0.7) * 20)
    np.testing.assert_array_equal(found["w"], [round((0.1 + i / mean * 0.7) * 20) for i in (0.1,)] + [20, found["v"]])
    assert sj.methods.osf.ranks({"v": -9.0, "u": 10.0}, params)["v"] == 1
    adapted = sj.adapt(params, {"[vw]": sj.osf(found)}, key=jax.random.key(0), roles=STACK)
    assert adapted["v"].high_left.shape[-1] == found["v"]


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match=r"w: osf: the preserved rank 9 is not in 0 \.\. 8"):
        adapt(matrix((12, 8)), 9)
    with pytest.raises(RankError, match=r"preserved=1\.5"):
        sj.osf(1.5)
    with pytest.raises(RankError, match="preserved=-1"):
        sj.osf(-1)
    with pytest.raises(RankError, match="one int per layer"):
        adapt(matrix((3, 8, 6)), {"w": np.array([1, 2])}, STACK)
    with pytest.raises(PatternError, match="w: osf: preserved has no rank for it"):
        adapt(matrix((12, 8)), {"v": 1})
    with pytest.raises(RankError, match="task=0"):
        sj.methods.osf.schedule(0, 3)
    with pytest.raises(PatternError, match=r"v: osf\.ranks"):
        sj.methods.osf.ranks({"v": 1.0}, {"w": jnp.zeros((2, 2))})
    with pytest.raises(RankError, match=r"w: .*not finite"):
        sj.methods.osf.ranks({"w": np.nan}, {"w": jnp.zeros((2, 2))})
    with pytest.raises(StatisticsError, match="no batches"):
        sj.methods.osf.importance(lambda p, x: x @ p["w"], {"w": jnp.zeros((2, 2))}, [])


@pytest.mark.parametrize("width", ["exact", "common"])
def test_a_summary_leaves_padding_out(width):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 4)), jnp.float32)}
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    ranks = np.array([1, 2, 4])
    adapted = sj.adapt(params, {"w": sj.osf({"w": ranks}, width=width)}, key=jax.random.key(0), roles=roles)
    assert sj.summary(adapted).trainable == int((4 - ranks).sum()) * (6 + 4 + 1)
    abstract = jax.eval_shape(lambda p: sj.adapt(p, {"w": sj.osf(1)}, key=jax.random.key(0), roles=roles), params)
    assert sj.summary(abstract).trainable == 3 * 3 * (6 + 4 + 1)
