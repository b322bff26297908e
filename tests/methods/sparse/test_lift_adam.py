"""LIFT's Adam against the formula in numpy and against optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from tests.tolerances import tolerance


def gradients(steps=7, size=5):
    scales = np.array([1.0, 1e-3, 1e-6, 1e-8, 0.0])
    return [np.random.default_rng(i).normal(size=size) * scales for i in range(steps)]


def run(transform, steps):
    params = jnp.zeros(5)
    state = transform.init(params)
    for gradient in steps:
        updates, state = transform.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = params + updates
    return np.asarray(params)


def test_epsilon_is_added_to_the_uncorrected_root():
    b1, b2, eps, lr = 0.9, 0.95, 1e-6, 0.1
    m = v = theta = np.zeros(5)
    for t, g in enumerate(gradients(), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    np.testing.assert_allclose(
        run(sj.methods.lift.lift_adam(lr), gradients()), theta, rtol=1e-4, atol=tolerance(size=4)
    )
    assert np.abs(run(sj.methods.lift.lift_adam(lr, eps_mode="optax"), gradients()) - theta).max() > 1e-2


def test_the_other_mode_is_optax_adam():
    found = run(sj.methods.lift.lift_adam(0.1, eps_mode="optax"), gradients())
    np.testing.assert_allclose(
        found, run(optax.adam(0.1, b2=0.95, eps=1e-6), gradients()), rtol=1e-4, atol=tolerance(size=4)
    )


def test_decay_is_decoupled_and_of_what_is_trained_alone():
    transform = sj.methods.lift.lift_adam(0.1, weight_decay=0.5)
    params = jnp.array([2.0])
    updates, _ = transform.update(jnp.zeros(1), transform.init(params), params)
    np.testing.assert_allclose(updates, [-0.1])


def test_a_schedule_is_followed_and_unknown_modes_are_refused():
    transform = sj.methods.lift.lift_adam(optax.linear_schedule(1.0, 0.0, 2))
    state = transform.init(jnp.zeros(1))
    sizes = []
    for _ in range(3):
        updates, state = transform.update(jnp.ones(1), state, jnp.zeros(1))
        sizes.append(round(float(-updates[0]), 3))
    assert sizes == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="eps_mode='torch'"):
        sj.methods.lift.lift_adam(1.0, eps_mode="torch")


def test_a_new_positions_first_step_has_the_published_size():
    transform = sj.methods.lift.scale_by_lift_adam(eps=0.0)
    for t in (1, 10, 2000):
        state = transform.init(jnp.zeros(1))._replace(count=jnp.asarray(t - 1, jnp.int32))
        updates, _ = jax.jit(transform.update)(jnp.array([-3.0]), state)
        size = np.sqrt(1 - 0.95**t) / (1 - 0.9**t) * (1 - 0.9) / np.sqrt(1 - 0.95)
        np.testing.assert_allclose(updates, [-size], rtol=1e-5)
    np.testing.assert_allclose(size, 0.447, atol=1e-3)
