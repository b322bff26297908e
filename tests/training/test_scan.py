"""A scanned run against the same steps one by one, and over seeds and rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from tests.tolerances import assert_rounding

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 4)), jnp.float32)
PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)}
apply = sj.with_adapters(lambda params, x: x @ params["w"])


def loss(adapted, x):
    return jnp.mean((apply(adapted, x) - 1.0) ** 2)


def adapted():
    return sj.adapt(PARAMS, {"w": sj.lora(2)}, key=jax.random.key(0))


def test_equals_steps_one_by_one():
    optimizer = optax.adam(0.1)
    end = jax.jit(lambda tree, x: sj.training.scan_steps(loss, optimizer, tree, x))(adapted(), X)
    trainable, frozen = sj.partition(adapted())
    state, losses = optimizer.init(trainable), []
    for x in X:
        value, gradients = jax.value_and_grad(lambda t, x=x: loss(sj.combine(t, frozen), x))(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(float(value))
    assert_rounding(end.losses, losses, size=len(X))
    for found, wanted in zip(jax.tree.leaves(sj.partition(end.adapted)[0]), jax.tree.leaves(trainable), strict=True):
        assert_rounding(found, wanted, size=64 * len(X))


def test_two_halves_are_one_whole():
    optimizer = optax.adam(0.1)
    run = jax.jit(lambda tree, x, state: sj.training.scan_steps(loss, optimizer, tree, x, opt_state=state))
    first = run(adapted(), X[:3], None)
    second = run(first.adapted, X[3:], first.opt_state)
    whole = run(adapted(), X, None)
    assert_rounding(second.losses, whole.losses[3:], size=len(X))
    assert int(optax.tree.get(second.opt_state, "count")) == len(X)


def test_over_rates_by_vmap_and_without_inputs():
    run = lambda rate: sj.training.scan_steps(lambda tree, _: loss(tree, X[0]), optax.sgd(rate), adapted(), steps=4)
    losses = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.1])).losses
    assert losses.shape == (2, 4)
    assert_rounding(losses[0], jnp.full(4, losses[0, 0]))
    assert losses[1, -1] < losses[1, 0]
