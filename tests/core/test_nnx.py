"""NNX modules that change while they run, loops of rematerialized layers, and stand-ins where they cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import subspace_jax as sj
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 6))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


def filled(adapted):
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(5)
    return sj.combine(jax.tree.map(lambda v: jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype), trainable), frozen)


def split(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        model = nnx.merge(graph, params, rest)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    return fn, params, rest


def test_statistics_and_counters_that_a_module_changes_come_back():
    fn, params, rest = split(Normalized(nnx.Rngs(0)))
    roles = sj.roles(fn, params, rest, X)
    adapted = filled(sj.adapt(params, {"**/kernel": sj.lora(2)}, key=KEY, roles=roles))
    run, merged = jax.jit(sj.with_adapters(fn)), sj.merge(adapted)
    ours, theirs = rest, rest
    for _ in range(2):  # a second step sees what the first one changed
        y, ours = run(adapted, ours, X)
        expected, theirs = jax.jit(fn)(merged, theirs, X)
        assert_rounding(y, expected, size=64)
    before, after, wanted = (jax.tree.leaves(tree) for tree in (rest, ours, theirs))
    assert len(before) == 4  # mean, variance, and the dropout's counter and key
    for old, new, same in zip(before, after, wanted, strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating):
            assert_rounding(new, same, size=64)
            assert not np.array_equal(old, new)
        else:
            assert jnp.array_equal(
                jax.random.key_data(new) if jax.dtypes.issubdtype(new.dtype, jax.dtypes.prng_key) else new,
                jax.random.key_data(same) if jax.dtypes.issubdtype(same.dtype, jax.dtypes.prng_key) else same,
            )


def test_a_module_that_was_made_outside_and_changes_is_answered_with_the_recipe():
    graph, params, rest = nnx.split(Normalized(nnx.Rngs(0)), nnx.Param, ...)
    adapted = sj.adapt(params, {"**/kernel": sj.lora(2)}, key=KEY)
    with pytest.raises(Exception, match="different trace level") as caught:
        sj.with_adapters(lambda p, x: nnx.merge(graph, p, rest)(x))(adapted, X)
    assert "nnx.split(model, nnx.Param, ...)[2]" in "".join(caught.value.__notes__)


def test_a_stand_in_in_a_live_module_says_what_to_do():
    model = Block(nnx.Rngs(0))
    _, params = nnx.split(model)
    nnx.update(model, sj.adapt(params, {"**/kernel": sj.lora(2)}, key=KEY))
    with pytest.raises(TypeError, match=r"stand-in weight \(lora of shape \(6, 6\)\).*with_adapters.*sj\.merge"):
        model(X)


@pytest.mark.parametrize("form", ["remat inside", "remat of the body"])
def test_a_scan_over_rematerialized_layers(form):
    layers = nnx.split_rngs(splits=4)(nnx.vmap(Block, in_axes=(0,), out_axes=0))(nnx.Rngs(0))
    graph, params = nnx.split(layers)
    block = nnx.remat(lambda layer, x: layer(x))

    def fn(params, x):
        layers = nnx.merge(graph, params)
        if form == "remat of the body":
            return nnx.scan(block, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)
        return nnx.scan(lambda x, layer: block(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)

    roles = sj.roles(fn, params, X)
    adapted = filled(sj.adapt(params, {"**/kernel": sj.lora(2)}, key=KEY, roles=roles))
    merged, apply = sj.merge(adapted), sj.with_adapters(fn)
    assert_rounding(jax.jit(apply)(adapted, X), fn(merged, X), size=64)
    trainable, frozen = sj.partition(adapted)
    ours = jax.grad(lambda t: jnp.sum(apply(sj.combine(t, frozen), X) ** 2))(trainable)
    whole = jax.grad(lambda p: jnp.sum(fn(p, X) ** 2))(merged)
    _, pull = jax.vjp(lambda t: sj.merge(sj.combine(t, frozen)), trainable)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(pull(whole)[0]), strict=True):
        assert_rounding(found, expected, size=2048)
