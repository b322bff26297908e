import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import trainable_size
from subspace_jax.methods.low_rank.dora import Magnitude
from subspace_jax.weights import LowRank
from tests.tolerances import tolerance

W = jnp.asarray(np.random.default_rng(0).normal(size=(32, 24)), jnp.float32)


def adapt(method, w=W, role=None):
    return sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0), roles={"w": role} if role else None)


@pytest.mark.parametrize(
    ("shape", "role", "axes"),
    [
        ((32, 24), None, (0,)),
        ((3, 3, 4, 6), sj.Role.conv(), (0, 1, 2)),
        ((4, 3, 10), sj.Role.dense((2,), (0, 1)), (2,)),
        ((3, 16, 12), sj.Role.dense((1,), (2,), (0,)), (1,)),
    ],
)
def test_magnitudes_start_as_the_column_lengths(shape, role, axes):
    w = np.random.default_rng(1).normal(size=shape)
    weight = adapt(sj.dora(sj.lora(2)), jnp.asarray(w, jnp.float32), role)["w"]
    expected = np.sqrt(np.sum(w**2, axis=axes))
    np.testing.assert_allclose(weight.magnitude.reshape(expected.shape), expected, rtol=1e-5)


def test_it_wraps_what_the_inner_method_makes():
    weight = adapt(sj.dora(sj.pissa(4, alpha=8)))["w"]
    assert isinstance(weight, Magnitude)
    assert isinstance(weight.direction, LowRank)
    assert weight.direction.start_a is not None
    assert (weight.method, weight.detach_norm, weight.rank) == ("dora(pissa)", True, 4)
    assert not adapt(sj.dora(sj.lora(4), norm="exact"))["w"].detach_norm
    assert trainable_size(adapt(sj.dora(sj.lora(4)))["w"]) == 4 * (32 + 24) + 24


def test_columns_keep_their_magnitudes_while_directions_learn():
    adapted = adapt(sj.dora(sj.lora(4)))
    trainable, frozen = sj.partition(adapted)
    tx = optax.adam(1e-2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 32)), jnp.float32)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return jnp.mean(sj.with_adapters(lambda p, x: x @ p["w"])(sj.combine(trainable, frozen), x) ** 2)

        updates, state = tx.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for _ in range(10):
        trainable, state = step(trainable, state)
    merged = np.asarray(sj.merge(sj.combine(trainable, frozen))["w"])
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.abs(trainable["w"].magnitude), rtol=1e-5)
    assert not np.allclose(merged, W, atol=1e-2)
    np.testing.assert_array_equal(frozen["w"].direction.base, W)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="'frozen'"):
        sj.dora(sj.lora(2), norm="frozen")
    with pytest.raises(TypeError, match=r"dora\(lora\(rank=8\)\)"):
        sj.dora(8)


def test_columns_of_zeros_are_said_at_adapt():
    w = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    w[:, 1] = 0.0
    with pytest.warns(UserWarning, match=r"dora: in a weight of shape \(6, 4\) 1 of 4 output columns are zero"):
        adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.dora(sj.lora(2))}, key=jax.random.key(0))
    np.testing.assert_array_equal(sj.merge(adapted)["w"][:, 1], np.zeros(6))


def test_a_step_where_base_and_product_cancel():
    """The weight that DoRA stands for, where W + a b is a thousandth of W: lengths were off by 6 %."""
    rng = np.random.default_rng(1)
    a, b, rest = (rng.normal(size=s).astype(np.float32) for s in ((64, 4), (4, 5), (64, 5)))
    product = a.astype(np.float64) @ b
    w = np.asarray(1e-3 * rest * np.linalg.norm(product) / np.linalg.norm(rest) - product, np.float32)
    weight = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.dora(sj.lora(4))}, key=jax.random.key(0))["w"]
    inner = dataclasses.replace(weight.direction, a=jnp.asarray(a), b=jnp.asarray(b))
    weight = dataclasses.replace(weight, direction=inner)
    direction = w.astype(np.float64) + product
    expected = direction / np.linalg.norm(direction, axis=0) * np.linalg.norm(w.astype(np.float64), axis=0)
    # Rounding of the sum is a share of its parts, which are a thousand times larger.
    room = 1e3 * tolerance("float32", norm=np.abs(expected).max())
    np.testing.assert_allclose(jax.jit(lambda w: w.materialize())(weight), expected, rtol=0, atol=room)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    found = sj.with_adapters(lambda w, x: x @ w)(weight, x)
    np.testing.assert_allclose(found, x @ expected, rtol=0, atol=8 * room * np.abs(x).max())
