"""Meta-learning: closed forms of a quadratic, difference quotients, and rates that are predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.methods import lemon


def square(phi, c):
    return 0.5 * sum(jnp.sum((phi[k] - c[k]) ** 2) for k in phi)


CENTERS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


ASKED = {"a": jnp.array([0.0, 3.0]), "b": jnp.array([[2.0]])}


THETA = {"a": jnp.array([4.0, 4.0]), "b": jnp.array([[-1.0]])}


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_quadratic_has_the_closed_form(first_order, steps):
    alpha = 0.3
    phi = lemon.adapt_to(square, THETA, CENTERS, alpha, steps=steps)
    shrink = (1 - alpha) ** steps
    for k in THETA:
        np.testing.assert_allclose(phi[k] - CENTERS[k], shrink * (THETA[k] - CENTERS[k]), rtol=1e-5)
    stacked = lambda tree: jax.tree.map(lambda v: v[None], tree)
    options = {"steps": steps, "first_order": first_order}
    gradient = jax.jit(
        jax.grad(lambda t: lemon.paml_loss(square, t, stacked(CENTERS), stacked(ASKED), alpha, **options))
    )(THETA)
    for k in THETA:
        factor = 1.0 if first_order else shrink
        np.testing.assert_allclose(gradient[k], factor * (phi[k] - ASKED[k]), rtol=1e-4)


def wavy(phi, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ phi["w"]) @ phi["v"] - y) ** 2)


def wavy_case():
    rng = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    theta = {"w": draw(3, 4), "v": draw(4)}
    return theta, (draw(2, 5, 3), draw(2, 5)), (draw(2, 6, 3), draw(2, 6))


def test_second_order_is_the_difference_quotient_and_first_order_the_gradient_where_it_ends():
    with jax.enable_x64(True):
        theta, support, query = wavy_case()
        whole = lambda t, first: lemon.paml_loss(wavy, t, support, query, 0.2, steps=3, first_order=first)
        value = jax.jit(lambda t: whole(t, False))
        exact = jax.jit(jax.grad(value))(theta)
        for index in ((0, 1), (2, 3)):
            step = jnp.zeros((3, 4)).at[index].set(1e-6)
            ahead, behind = ({**theta, "w": theta["w"] + s * step} for s in (1, -1))
            quotient = (value(ahead) - value(behind)) / 2e-6
            np.testing.assert_allclose(exact["w"][index], quotient, rtol=1e-6)
        first = jax.jit(jax.grad(lambda t: whole(t, True)))(theta)
        expected, slope = jax.tree.map(jnp.zeros_like, theta), jax.jit(jax.grad(wavy))
        for b in range(2):
            task = jax.tree.map(lambda v, b=b: v[b], (support, query))
            phi = theta
            for _ in range(3):
                phi = jax.tree.map(lambda p, g: p - 0.2 * g, phi, slope(phi, task[0]))
            expected = jax.tree.map(lambda a, g: a + g / 2, expected, slope(phi, task[1]))
        for k in theta:
            np.testing.assert_allclose(first[k], expected[k], rtol=1e-9)
        assert np.abs(first["w"] - exact["w"]).max() > 1e-3


def test_no_steps_are_joint_training_on_the_queries():
    theta, support, query = jax.tree.map(lambda v: v.astype(jnp.float32), wavy_case())
    joint = np.mean([wavy(theta, jax.tree.map(lambda v, b=b: v[b], query)) for b in range(2)])
    np.testing.assert_allclose(lemon.paml_loss(wavy, theta, support, query, 0.1, steps=0), joint, rtol=1e-6)


def test_inner_gradients_are_clamped_left_out_and_noisy_as_asked():
    found = lemon.adapt_to(square, THETA, CENTERS, 0.5, steps=1, clamp=1.0)
    np.testing.assert_allclose(found["a"], [3.5, 3.5])
    np.testing.assert_allclose(found["b"], [[-0.5]])
    found = lemon.adapt_to(square, THETA, CENTERS, 0.5, steps=2, adapted=lambda path: path == "a")
    np.testing.assert_array_equal(found["b"], THETA["b"])
    each = lemon.adapt_to(square, THETA, CENTERS, {"a": 0.5, "b": 0.0}, steps=1)  # one rate a leaf, as MetaSGD
    np.testing.assert_allclose(each["a"], [2.5, 1.0])
    np.testing.assert_array_equal(each["b"], THETA["b"])
    adam, expected = optax.adamw(0.1), THETA
    state, slope = adam.init(THETA), jax.jit(jax.grad(square))
    for _ in range(3):
        updates, state = adam.update(slope(expected, CENTERS), state, expected)
        expected = jax.tree.map(lambda p, u: p + 0.5 * u, expected, updates)
    found = lemon.adapt_to(square, THETA, CENTERS, 0.5, steps=3, optimizer=adam)
    for k in THETA:
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-5)
    with pytest.raises(ValueError, match="neither a number nor a tree"):
        lemon.adapt_to(square, THETA, CENTERS, {"a": 0.5})
    wide = {"a": jnp.zeros(20_000)}
    noisy = lemon.adapt_to(square, wide, wide, 0.1, steps=1, temperature=0.2, key=jax.random.key(0))
    np.testing.assert_allclose(np.std(noisy["a"]), np.sqrt(2 * 0.1 * 0.2), rtol=0.02)


def test_a_predicted_rate_has_a_gradient_while_inner_gradients_are_constants():
    network = lemon.RateNetwork(largest=1.0, hidden=8)
    encoding = jnp.asarray(np.random.default_rng(7).normal(size=(5, 16)), jnp.float32)
    rates = network.init(jax.random.key(0), encoding)["params"]
    mask = jnp.array([True, True, True, False, False])
    value = network.apply({"params": rates}, encoding, mask)
    np.testing.assert_allclose(value, network.apply({"params": rates}, encoding[:3]), rtol=1e-6)
    hidden = np.asarray(encoding[:3], np.float64)
    for name in ("Dense_0", "Dense_1"):
        hidden = np.maximum(hidden @ np.asarray(rates[name]["kernel"]) + rates[name]["bias"], 0)
    logits = hidden @ np.asarray(rates["Dense_2"]["kernel"]) + rates["Dense_2"]["bias"]
    np.testing.assert_allclose(value, 1 / (1 + np.exp(-logits.mean())), rtol=1e-5)
    theta = {"model": THETA, "rate": rates}
    rate = lambda theta, support: network.apply({"params": theta["rate"]}, support["encoding"], mask)
    loss = lambda theta, data: square(theta["model"], data["c"])
    inner = lambda path: path.startswith("model/")
    task = lambda c: jax.tree.map(lambda v: v[None], {"c": c, "encoding": encoding})
    gradient = jax.jit(
        jax.grad(
            lambda t: lemon.paml_loss(loss, t, task(CENTERS), task(ASKED), rate, steps=1, clamp=1.0, adapted=inner)
        )
    )(theta)
    # One step moves each entry by the rate times the sign of its clamped gradient, all of them larger than one.
    moved = {k: THETA[k] - value * jnp.sign(THETA[k] - CENTERS[k]) for k in THETA}
    along = -sum(jnp.sum((moved[k] - ASKED[k]) * jnp.sign(THETA[k] - CENTERS[k])) for k in THETA)
    slope = jax.jit(jax.grad(lambda r: network.apply({"params": r}, encoding, mask)))(rates)
    for found, expected in zip(jax.tree.leaves(gradient["rate"]), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(found, along * expected, rtol=1e-4, atol=1e-6)
    assert float(optax.tree.norm(gradient["rate"])) > 0
