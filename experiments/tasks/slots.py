"""The digits in slots: one network reads a digit in any of four places, experts read shifted ones in a place each.

An input of 256 numbers is four slots of 64, all empty but one, which holds an 8x8 digit of scikit-learn. The base, a
ReLU network 256-128-10, reads plain digits in any slot. Expert `t` is fine-tuned on digits shifted by one pixel in slot
`t` alone; merged, the four are to read shifted digits everywhere.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj

SLOTS, PIXELS, HIDDEN = 4, 64, 128
Part = Literal["train", "validation", "test"]


@functools.cache
def digits(part: Part, shifted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns images `[n, 64]` in [0, 1] and classes `[n]`; the parts are the same, shifted or not."""
    from sklearn import datasets

    found: Any = datasets.load_digits()
    images = found.images.astype(np.float32) / 16.0
    if shifted:
        images = np.pad(images, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    order = np.random.default_rng(0).permutation(len(images))
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    rows = {"train": order[:first], "validation": order[first:second], "test": order[second:]}[part]
    return images[rows].reshape(-1, PIXELS), found.target[rows]


def placed(images: Any, slot: jax.Array | int) -> jax.Array:
    """Returns inputs `[n, 256]` with every image in its slot."""
    where = jax.nn.one_hot(jnp.broadcast_to(jnp.asarray(slot), (len(images),)), SLOTS)
    return (where[:, :, None] * images[:, None, :]).reshape(len(images), SLOTS * PIXELS)


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns logits `[n, 10]` of inputs `[n, 256]`."""
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


apply = sj.with_adapters(network)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "batch_size"))
def fit(
    adapted: Any,
    key: jax.Array,
    data: tuple[Any, Any],
    slot: jax.Array | int,
    optimizer: Any,
    steps: int,
    batch_size: int = 128,
) -> Any:
    """Trains what learns; `slot` -1 places every digit at random."""
    x, y = data

    x, y = jnp.asarray(x), jnp.asarray(y)

    def objective(adapted: Any, key: jax.Array) -> jax.Array:
        rows_key, slot_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, len(x))
        place = jnp.where(slot < 0, jax.random.randint(slot_key, (batch_size,), 0, SLOTS), slot)
        return loss(adapted, placed(x[rows], place), y[rows])

    return sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps)).adapted


@functools.cache
def adam(rate: float) -> optax.GradientTransformation:
    """One object a rate, so that every call of `fit` finds the program compiled for it."""
    return optax.adam(rate)


@functools.cache
def base_network(seed: int, steps: int = 1500) -> Any:
    """Returns the parameters that read plain digits in any slot."""
    key, *keys = jax.random.split(jax.random.key(seed), 3)
    initializer = jax.nn.initializers.he_normal()
    sizes = {"first": (SLOTS * PIXELS, HIDDEN), "last": (HIDDEN, 10)}
    params = {
        name: {"kernel": initializer(k, size), "bias": jnp.zeros(size[1])}
        for (name, size), k in zip(sizes.items(), keys, strict=True)
    }
    everything = sj.adapt(params, {"**": sj.full()}, key=key)
    return sj.merge(fit(everything, key, digits("train", False), -1, adam(1e-3), steps))


def experts(base: Any, rules: Any, seed: int, steps: int, rates: tuple[float, ...]) -> list[Any]:
    """Returns one fine-tuned tree for every slot.

    Args:
      base: what they start from.
      rules: what is adapted, as `sj.adapt` takes it.
      seed: of adapters and batches.
      steps: of Adam.
      rates: its learning rate, one for every expert.
    """
    found = []
    for slot, rate in enumerate(rates):
        key = jax.random.key(1000 * seed + slot)
        adapted = sj.adapt(base, rules, key=key)
        found.append(fit(adapted, key, digits("train", True), slot, adam(rate), steps))
    return found


@functools.partial(jax.jit, static_argnames=("part", "shifted"))
def _accuracies(params: Any, part: Part, shifted: bool) -> jax.Array:
    x, y = digits(part, shifted)
    return jnp.stack([jnp.mean(apply(params, placed(x, slot)).argmax(-1) == y) for slot in range(SLOTS)])


def accuracies(params: Any, part: Part, *, shifted: bool) -> list[float]:
    """Returns the share of digits read right in every slot."""
    return np.asarray(_accuracies(params, part, shifted)).tolist()
