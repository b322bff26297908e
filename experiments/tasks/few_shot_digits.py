"""Few digits in another order of the pixels, learned by the network of upright digits; rates are arguments.

Several experiments adapt its two hidden kernels to 16 images of each class, with its output layer frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks import digits_task, permuted_digits


@functools.cache
def permuted(seed: int, per_class: int) -> digits_task.Digits:
    """Returns few training images of each class and all test images, with their pixels in one order."""
    return _few(permuted_digits.permuted(0, seed), seed, per_class)


@functools.cache
def turned(seed: int, per_class: int) -> digits_task.Digits:
    """Returns few training images of each class and all test images, turned by 90 degrees."""
    return _few(digits_task.load_digits(1), seed, per_class)


def _few(digits: digits_task.Digits, seed: int, per_class: int) -> digits_task.Digits:
    rng, classes = np.random.default_rng([seed, per_class]), np.asarray(digits.y)
    rows = np.concatenate([rng.choice(np.flatnonzero(classes == c), per_class, replace=False) for c in range(10)])
    return dataclasses.replace(digits, x=digits.x[rows], y=digits.y[rows])


def adapt_and_fit(
    method: sj.Method,
    digits: digits_task.Digits,
    rate: float,
    seed: int,
    steps: int,
    batch: int,
    gains: Callable[[Any], Any] | None = None,
) -> Any:
    """Adapts the pretrained network's hidden kernels by Adam.

    Args:
      method: what adapts them.
      digits: few images.
      rate: learning rate.
      seed: of the network, the adapter and the batches.
      steps: number of steps.
      batch: examples of a step.
      gains: gives what updates are multiplied with, of a tree like what learns.

    Returns:
      The trained tree.
    """
    adapted = sj.adapt(digits_task.pretrained(seed), {digits_task.HIDDEN: method}, key=jax.random.key(100 + seed))
    found = None if gains is None else gains(sj.partition(adapted)[0])
    return _fit(adapted, jax.random.key(200 + seed), digits.x, digits.y, rate, found, steps=steps, batch=batch)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _fit(
    adapted: Any, key: jax.Array, x: jax.Array, y: jax.Array, rate: Any, gains: Any, *, steps: int, batch: int
) -> Any:
    def objective(adapted: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch,), 0, len(x))
        return digits_task.loss(adapted, x[rows], y[rows])

    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda u, g: u * g, updates, gains))
    optimizer = optax.adam(rate) if gains is None else optax.chain(optax.adam(rate), scaled)
    return sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps)).adapted


@jax.jit
def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the share of images that are read right."""
    return (digits_task.apply(params, x).argmax(-1) == y).mean()
