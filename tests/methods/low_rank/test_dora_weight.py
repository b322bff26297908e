import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.methods.low_rank.dora import Magnitude
from tests.weights.test_low_rank import dense
from tests.weights.test_low_rank import make as make_low_rank


def make(shape=(9, 7), rank=3, *, detach_norm=True, role=None, seed=0, **options):
    direction = make_low_rank(shape, rank, role=role, seed=seed, **options)
    sizes = direction.role.stack_shape(shape) + direction.role.sizes(shape)[1:]
    magnitude = jnp.asarray(np.random.default_rng(seed + 1).normal(size=sizes), jnp.float32)
    return Magnitude(
        direction=direction,
        magnitude=magnitude,
        detach_norm=detach_norm,
        role=direction.role,
        dtype=direction.dtype,
        trainable=("magnitude",),
    )


@pytest.mark.parametrize(
    ("shape", "role"),
    [
        ((9, 7), None),
        ((3, 9, 7), sj.Role.dense((1,), (2,), (0,))),
        ((4, 3, 5), sj.Role.dense((2,), (0, 1))),
        ((3, 2, 4, 5), sj.Role.conv()),
    ],
)
def test_column_lengths_are_the_magnitudes(shape, role):
    """Whatever the factors are; over every axis but the outputs."""
    w = make(shape, 2, role=role)
    columns = np.asarray(w.role.matrix(w.materialize()), np.float64)
    np.testing.assert_allclose(np.linalg.norm(columns, axis=-2), np.abs(w.magnitude), rtol=1e-5)
    directions = np.asarray(w.role.matrix(w.direction.materialize()), np.float64)
    cosine = np.sum(columns * directions, -2) / np.linalg.norm(columns, axis=-2) / np.linalg.norm(directions, axis=-2)
    np.testing.assert_allclose(cosine, np.sign(w.magnitude), rtol=1e-5)


@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "exact"])
def test_gradients_are_the_formulas(detach_norm):
    w = make(detach_norm=detach_norm)
    rng = np.random.default_rng(5)
    x, cotangent = rng.normal(size=(6, 9)), rng.normal(size=(6, 7))

    def loss(w):
        y = sj.with_adapters(lambda w, x: x @ w)(w, jnp.asarray(x, jnp.float32))
        return jnp.sum(y * jnp.asarray(cotangent, jnp.float32))

    found = jax.jit(jax.grad(loss))(w)
    v, m = dense(w.direction), np.asarray(w.magnitude, np.float64)
    a, b, s = np.asarray(w.direction.a), np.asarray(w.direction.b), w.direction.scale
    n, gradient = np.linalg.norm(v, axis=0), x.T @ cotangent
    radial = 0 if detach_norm else v * np.sum(v * gradient, axis=0) / n**2
    wrt_v = m / n * (gradient - radial)
    np.testing.assert_allclose(found.direction.a, s * wrt_v @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.direction.b, s * a.T @ wrt_v, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.magnitude, np.sum(v * gradient, axis=0) / n, rtol=1e-4, atol=1e-4)
    assert not np.asarray(found.direction.base).any()


@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "exact"])
def test_a_zero_column_counts_as_of_length_one(detach_norm):
    w = make(detach_norm=detach_norm)
    base, b = w.direction.base.at[:, 2].set(0.0), w.direction.b.at[:, 2].set(0.0)
    w = dataclasses.replace(
        w,
        direction=dataclasses.replace(w.direction, base=base, b=b),
        magnitude=w.magnitude.at[2].set(0.0),
    )
    np.testing.assert_array_equal(w.materialize()[:, 2], 0.0)
    assert w.factors()[2] == 0.0

    def loss(w):
        return jnp.sum(sj.with_adapters(lambda w, x: x @ w)(w, jnp.ones((2, 9))) ** 2)

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(w)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_forward_is_the_formula_with_and_without_dropout(dropout):
    """The base's unscaled part sees the raw input, everything else the dropped one."""
    w = make(dropout=dropout)
    x = np.random.default_rng(5).normal(size=(6, 9))
    apply = sj.with_adapters(lambda tree, x: x @ tree["w"])
    key, array = jax.random.key(3), jnp.asarray(x, jnp.float32)
    seen = x
    if dropout:
        identity = dataclasses.replace(
            make_low_rank((9, 9), 9, dropout=dropout, scale=1.0), base=jnp.zeros((9, 9)), a=jnp.eye(9), b=jnp.eye(9)
        )
        seen = np.asarray(apply(sj.with_dropout({"w": identity}, key), array))
        assert (seen == 0).any()
    base, low = np.asarray(w.direction.base), w.direction
    factor = np.asarray(w.magnitude) / np.linalg.norm(dense(low), axis=0)
    expected = (
        x @ base + (factor - 1) * (seen @ base) + factor * low.scale * (seen @ np.asarray(low.a) @ np.asarray(low.b))
    )
    found = apply(sj.with_dropout({"w": w}, key), array)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_columns_cannot_be_cut_where_nothing_can_sum_over_them():
    from jax.sharding import PartitionSpec

    w = make()
    assert w.partition_specs(PartitionSpec(None, "model"), exact=True).magnitude == PartitionSpec("model")
    assert w.partition_specs(PartitionSpec("model", None)).direction.a == PartitionSpec("model", None)
    with pytest.raises(sj.core.RoleError, match="length of a whole column"):
        w.partition_specs(PartitionSpec("model", None), exact=True)


@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "exact"])
def test_a_rematerialized_part_computes_constant_lengths_once(detach_norm):
    w = make((32, 24), detach_norm=detach_norm)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(6, 32)), jnp.float32)

    def loss(w, layer):
        return jnp.sum(jnp.tanh(sj.with_adapters(layer)(w, x)) ** 2)

    plain = lambda w, x: jnp.sin(x @ w)
    expected, found = (jax.jit(jax.grad(loss), static_argnums=1)(w, f) for f in (plain, jax.checkpoint(plain)))
    assert found.lengths is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(w, jax.checkpoint(plain)))
    assert text.count("cond[") == (1 if detach_norm else 2)  # one where lengths cancel, for each time they are computed
