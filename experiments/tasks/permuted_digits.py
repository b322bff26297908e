"""Permuted digits: the 8x8 digits of scikit-learn with the pixels of each task in an order of its own.

The network is 64-100-100-10 with ReLUs, without biases, and with one output layer for all tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks import digits_task

LAYERS = ("first", "second", "out")
SIZES = (64, 100, 100, 10)


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns logits of images as rows."""
    x = jax.nn.relu(x @ params["first"])
    return jax.nn.relu(x @ params["second"]) @ params["out"]


apply = sj.with_adapters(network)


def start(seed: int) -> dict[str, jax.Array]:
    """Returns an untrained network."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = itertools.pairwise(SIZES)
    return {n: jax.nn.initializers.he_normal()(k, s) for n, k, s in zip(LAYERS, keys, shapes, strict=True)}


def permuted(task: int, seed: int) -> digits_task.Digits:
    """Returns the digits with pixels in the order of a task."""
    digits = digits_task.load_digits()
    order = np.random.default_rng([seed, task]).permutation(64)
    return dataclasses.replace(digits, x=digits.x[:, order], x_test=digits.x_test[:, order])


def accuracy(params: Any, digits: digits_task.Digits) -> float:
    """Returns the share of test digits that are read right."""
    return float(jnp.mean(_predict(params, digits.x_test) == digits.y_test))


@jax.jit
def _predict(params: Any, x: jax.Array) -> jax.Array:
    return apply(params, x).argmax(-1)


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "batch_size", "penalty"))
def fit(
    adapted: Any,
    state: Any,
    key: jax.Array,
    data: tuple[jax.Array, jax.Array],
    optimizer: Any,
    steps: int,
    batch_size: int,
    penalty: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """Trains what learns; one compiled loop for all tasks.

    Args:
      adapted: tree with stand-in weights.
      state: of the optimizer.
      key: draws the batches; consumed.
      data: images and classes.
      optimizer: an optax transformation.
      steps: number of steps.
      batch_size: examples of a step, drawn with replacement.
      penalty: add that of O-LoRA to the loss.

    Returns:
      The trained tree, the optimizer's state and the loss of every step.
    """
    x, y = data

    def objective(whole: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(x))
        loss = optax.softmax_cross_entropy_with_integer_labels(apply(whole, x[rows]), y[rows]).mean()
        return loss + sj.methods.o_lora.penalty(whole) if penalty else loss

    end = sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps), opt_state=state)
    return end.adapted, end.opt_state, end.losses


@jax.jit
def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy on images and classes."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()
