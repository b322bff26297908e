import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, RoleError


def adapt(w, method, *, seed=0, role=None):
    return sj.adapt({"w": w}, {"w": method}, key=jax.random.key(seed), roles={"w": role} if role else None)


def dense(seed=0, shape=(32, 24)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (lambda: sj.lora(4), 1.0),
        (lambda: sj.lora(4, alpha=16), 4.0),
        (lambda: sj.lora(4, alpha=16, rank_stabilized=True), 8.0),
        (lambda: sj.lora(9, rank_stabilized=True), 3.0),
    ],
)
def test_the_scale_is_alpha_over_rank_or_its_root(method, scale):
    assert adapt(dense(), method())["w"].scale == scale


@pytest.mark.parametrize(
    ("shape", "role", "fan_in"),
    [
        ((400, 24), None, 400),
        ((3, 400, 24), sj.Role.dense((1,), (2,), (0,)), 400),
        ((20, 20, 24), sj.Role.dense((0, 1), (2,)), 400),
        ((24, 400), sj.Role.dense((1,), (0,)), 400),
        ((3, 3, 40, 24), sj.Role.conv(), 360),
        ((3, 3, 40, 24), sj.Role.conv(groups=2), 360),
    ],
    ids=str,
)
def test_a_is_uniform_with_the_bound_of_the_inputs_and_b_is_zero(shape, role, fan_in):
    weight = adapt(jnp.zeros(shape), sj.lora(8), role=role)["w"]
    a, bound = np.asarray(weight.a), 1 / np.sqrt(fan_in)
    assert weight.a.shape[-2:] == (fan_in, 8)
    assert 0.98 * bound < np.abs(a).max() <= bound
    assert abs(a.std() / (bound / np.sqrt(3)) - 1) < 0.05
    assert abs(a.mean()) < 0.05 * bound
    assert not np.asarray(weight.b).any()


def test_gaussian_has_standard_deviation_one_over_rank():
    a = np.asarray(adapt(jnp.zeros((2000, 4)), sj.lora(8, init="gaussian"))["w"].a)
    assert abs(a.std() * 8 - 1) < 0.03
    assert np.abs(a).max() > 3 / 8


def test_an_embedding_starts_with_a_of_zero_and_a_normal_b():
    weight = adapt(jnp.zeros((50, 300)), sj.lora(8), role=sj.Role.embedding())["w"]
    assert not np.asarray(weight.a).any()
    assert abs(np.asarray(weight.b).std() - 1) < 0.05


def test_stacked_layers_and_other_leaves_get_draws_of_their_own():
    role = sj.Role.dense((1,), (2,), (0,))
    a = np.asarray(adapt(jnp.zeros((3, 32, 24)), sj.lora(4), role=role)["w"].a)
    assert not np.allclose(a[0], a[1])
    params = {"u": jnp.zeros((32, 24)), "v": jnp.zeros((32, 24))}
    both = sj.adapt(params, {"*": sj.lora(4)}, key=jax.random.key(0))
    alone = sj.adapt(params, {"v": sj.lora(4)}, key=jax.random.key(0))
    assert not np.allclose(both["u"].a, both["v"].a)
    np.testing.assert_array_equal(both["v"].a, alone["v"].a)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors_are_float32_whatever_the_base_is_unless_asked(dtype):
    weight = adapt(dense().astype(dtype), sj.lora(4))["w"]
    assert weight.a.dtype == weight.b.dtype == jnp.float32
    narrow = adapt(dense().astype(dtype), sj.lora(4, dtype=jnp.bfloat16))["w"]
    assert narrow.a.dtype == narrow.b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow.a, weight.a.astype(jnp.bfloat16))


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_one_step_of_descent_changes_the_weight_by_the_projected_gradient(rank_stabilized):
    """merge - W = -eta s^2 a a^T G, with G the gradient of the whole weight."""
    rng = np.random.default_rng(0)
    w, x, target = dense(), rng.normal(size=(16, 32)), rng.normal(size=(16, 24))
    adapted = adapt(w, sj.lora(4, alpha=6.0, rank_stabilized=rank_stabilized))
    trainable, frozen = sj.partition(adapted)

    def loss(trainable):
        y = sj.with_adapters(lambda p, x: x @ p["w"])(sj.combine(trainable, frozen), jnp.asarray(x, jnp.float32))
        return 0.5 * jnp.sum((y - jnp.asarray(target, jnp.float32)) ** 2)

    eta = 1e-2
    stepped = jax.tree.map(lambda v, g: v - eta * g, trainable, jax.jit(jax.grad(loss))(trainable))
    change = np.asarray(sj.merge(sj.combine(stepped, frozen))["w"], np.float64) - np.asarray(w)
    gradient = x.T @ (x @ np.asarray(w, np.float64) - target)
    a, s = np.asarray(adapted["w"].a, np.float64), adapted["w"].scale
    expected = -eta * s**2 * a @ a.T @ gradient
    np.testing.assert_allclose(change, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(stepped["w"].a, adapted["w"].a)


def test_the_first_decrease_is_even_in_rank_when_rank_stabilized_and_falls_with_it_otherwise():
    """Its mean over draws is eta s^2 r |G|^2 / (3 d_in)."""
    gradient = np.random.default_rng(0).normal(size=(48, 16))
    keys, decrease = jax.random.split(jax.random.key(0), 64), {}
    for rank_stabilized in (False, True):
        for rank in (4, 16, 64):
            method = sj.lora(rank, alpha=8.0, rank_stabilized=rank_stabilized)

            def draw(key, method=method):
                return method.init(key, jnp.zeros((48, 16)), sj.Role.dense(), None).a

            a = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
            s = 8.0 / (np.sqrt(rank) if rank_stabilized else rank)
            mean = s**2 * np.mean(np.sum((np.swapaxes(a, 1, 2) @ gradient) ** 2, axis=(1, 2)))
            expected = s**2 * rank * np.sum(gradient**2) / (3 * 48)
            assert abs(mean / expected - 1) < 0.1
            decrease[rank_stabilized, rank] = mean
    for low, high in ((4, 16), (16, 64)):
        assert 3.4 < decrease[False, low] / decrease[False, high] < 4.6
        assert 0.85 < decrease[True, low] / decrease[True, high] < 1.15


def test_counts_are_the_published_ones():
    """RoBERTa-base, rank 8 on queries and values: 294,912 values; DoRA adds one per output."""
    kernel = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    names = ("query", "key", "value", "output")
    params = {f"layer_{i}": {n: {"kernel": kernel} for n in names} for i in range(12)}

    def count(method):
        rules = {"**/query/kernel": method, "**/value/kernel": method}
        adapted = jax.eval_shape(lambda p: sj.adapt(p, rules, key=jax.random.key(0)), params)
        return sum(leaf.size for leaf in jax.tree.leaves(sj.partition(adapted)[0]))

    assert count(sj.lora(8)) == 294_912
    assert count(sj.dora(sj.lora(8))) == 294_912 + 24 * 768
    assert count(sj.pissa(8)) == 294_912


def test_a_rank_above_the_smaller_side_is_wasteful_and_works():
    adapted = adapt(dense(shape=(6, 4)), sj.lora(9))
    assert adapted["w"].a.shape == (6, 9)
    np.testing.assert_array_equal(sj.merge(adapted)["w"], dense(shape=(6, 4)))


class TestErrors:
    @pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
    def test_rank(self, rank):
        with pytest.raises(RankError, match=r"lora: rank=.*expected an int of at least 1"):
            sj.lora(rank)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0])
    def test_dropout(self, dropout):
        with pytest.raises(ValueError, match=f"dropout={dropout}"):
            sj.lora(4, dropout=dropout)

    def test_init(self):
        with pytest.raises(ValueError, match="'xavier'"):
            sj.lora(4, init="xavier")

    def test_an_array_of_several_axes_needs_a_role(self):
        with pytest.raises(RoleError, match=r"w: .*\(3, 4, 5\).*roles="):
            adapt(jnp.ones((3, 4, 5)), sj.lora(2))

    def test_a_vector_is_no_matrix(self):
        with pytest.raises(RoleError, match=r"w: .*\(3,\)"):
            adapt(jnp.ones(3), sj.lora(2))

    def test_integers_do_not_learn(self):
        with pytest.raises(PatternError, match="int32"):
            adapt(jnp.ones((3, 4), jnp.int32), sj.lora(2))
