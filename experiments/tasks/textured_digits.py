"""Digits on textured backgrounds, a small diffusion model of plain digits, and a classifier of both."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.methods import hypernetwork

NULL, SIDE = 10, 8
PATTERNS = ((1, 0), (0, 1), (1, 1), (2, 0))
KERNELS = ("first", "second", "last")


def denoise(params: Any, x: jax.Array, t: jax.Array, c: jax.Array) -> jax.Array:
    """Returns the noise in images `[n, 64]` at timesteps `[n]`, of classes `[n]`; 10 for none."""
    angles = t[:, None] / 100.0 * jnp.exp(jnp.linspace(0.0, 4.0, 16))
    h = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles), params["classes"][c]], -1)
    for name in KERNELS:
        h = h @ params[name]["kernel"] + params[name]["bias"]
        h = h if name == "last" else jax.nn.silu(h)
    return h


def patterns() -> np.ndarray:
    """Returns the four backgrounds `[4, 64]`, as large as a coefficient of one."""
    places = (np.arange(SIDE) + 0.5) / SIDE * np.pi
    return np.stack([np.outer(np.cos(i * places), np.cos(j * places)).ravel() for i, j in PATTERNS])


def pictures(digits: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Returns digits on backgrounds, `[n, 64]`."""
    return jnp.clip(0.8 * digits + coefficients @ jnp.asarray(patterns(), jnp.float32), -2.0, 2.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_base(steps: int, noise_steps: int, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
    """Returns the parameters of a noise predictor of plain digits."""
    keys = jax.random.split(key, 5)
    init, sizes = jax.nn.initializers.lecun_normal(), (128, 256, 256, 64)
    shapes = zip(KERNELS, keys, sizes, sizes[1:], strict=False)
    params: Any = {n: {"kernel": init(k, (i, o)), "bias": jnp.zeros(o)} for n, k, i, o in shapes}
    params["classes"] = jax.random.normal(keys[3], (NULL + 1, 32))
    levels = hypernetwork.cosine_schedule(noise_steps)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows, t, noise, drop = jax.random.split(key, 4)
        rows = jax.random.randint(rows, (128,), 0, len(x))
        t = jax.random.randint(t, (128,), 0, noise_steps)
        noise = jax.random.normal(noise, (128, 64))
        c = jnp.where(jax.random.bernoulli(drop, 0.1, (128,)), NULL, y[rows])
        return jnp.mean(jnp.square(denoise(params, hypernetwork.add_noise(x[rows], noise, levels[t]), t, c) - noise))

    return _adam(loss, params, keys[4], steps)


@jax.jit
def train_classifier(x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
    """Returns a classifier of digits with or without backgrounds."""
    keys = jax.random.split(key, 3)
    init = jax.nn.initializers.he_normal()
    params = {"a": init(keys[0], (64, 256)), "b": init(keys[1], (256, 10)), "c": jnp.zeros(256)}

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows, drawn, plain, noise = jax.random.split(key, 4)
        rows = jax.random.randint(rows, (256,), 0, len(x))
        coefficients = 0.6 * jax.random.normal(drawn, (256, 4)) * jax.random.bernoulli(plain, 0.8, (256, 1))
        shown = pictures(x[rows], coefficients) + 0.1 * jax.random.normal(noise, (256, 64))
        return optax.softmax_cross_entropy_with_integer_labels(classify(params, shown), y[rows]).mean()

    return _adam(loss, params, keys[2], 3000)


def classify(params: Any, x: jax.Array) -> jax.Array:
    """Returns logits of the ten digits."""
    return jax.nn.relu(x @ params["a"] + params["c"]) @ params["b"]


def _adam(loss: Any, params: Any, key: jax.Array, steps: int) -> Any:
    adam = optax.adam(1e-3)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, adam.init(params)), jax.random.split(key, steps))[0][0]
