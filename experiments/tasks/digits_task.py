"""The rotated digits: a small network that reads upright digits learns to read them turned by 90 degrees.

The 8x8 digits of scikit-learn, a ReLU network 64-128-128-10, trained on upright digits to about 98.5 %. Several
experiments adapt its two hidden kernels to the turned ones, each with its own methods and budget.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj

SIZES = (64, 128, 128, 10)
HIDDEN = "hidden_*/kernel"


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images as rows, split into training and test.

    Attributes:
      x: `[train, 64]` in [-0.5, 0.5].
      y: `[train]` classes.
      x_test: `[test, 64]`.
      y_test: `[test]`.
    """

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def load_digits(quarter_turns: int = 0, test_share: float = 0.2) -> Digits:
    """Returns the digits turned by a multiple of 90 degrees; the split is the same for every turn."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = np.rot90(found.images / 16.0 - 0.5, quarter_turns, axes=(1, 2)).reshape(-1, 64).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test = order[: int(test_share * len(order))]
    train = order[len(test) :]
    return Digits(*(jnp.asarray(v) for v in (images[train], found.target[train], images[test], found.target[test])))


def network(params: Any, x: jax.Array) -> jax.Array:
    """Returns logits `[batch, 10]` of images `[batch, 64]`."""
    for name in ("hidden_0", "hidden_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


apply = sj.with_adapters(network)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def accuracy(params: Any, digits: Digits) -> jax.Array:
    """Returns the share of test digits that are read right."""
    return jnp.mean(apply(params, digits.x_test).argmax(-1) == digits.y_test)


@functools.partial(jax.jit, static_argnames=("optimizer", "steps", "batch_size"))
def fit(
    adapted: Any, key: jax.Array, digits: tuple[jax.Array, jax.Array], optimizer: Any, steps: int, batch_size: int = 128
) -> tuple[Any, jax.Array]:
    """Trains what learns; one compiled loop.

    Args:
      adapted: tree with stand-in weights.
      key: draws the batches; consumed.
      digits: images and classes.
      optimizer: an optax transformation.
      steps: number of steps.
      batch_size: examples of a step, drawn with replacement.

    Returns:
      The trained tree and the loss of every step.
    """
    x, y = digits

    def objective(adapted: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(x))
        return loss(adapted, x[rows], y[rows])

    end = sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps))
    return end.adapted, end.losses


@functools.cache
def pretrained(seed: int, steps: int = 1500) -> Any:
    """Returns the parameters of a network trained on upright digits."""
    key, *keys = jax.random.split(jax.random.key(seed), 4)
    initializer = jax.nn.initializers.he_normal()
    params = {
        name: {"kernel": initializer(k, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for name, k, inputs, outputs in zip(("hidden_0", "hidden_1", "out"), keys, SIZES, SIZES[1:], strict=False)
    }
    digits = load_digits()
    everything = sj.adapt(params, {"**": sj.full()}, key=key)
    return sj.merge(fit(everything, key, (digits.x, digits.y), _ADAM, steps)[0])


# One object, so that every call of `fit` finds the program compiled for it.
_ADAM = optax.adam(1e-3)


def adapt_and_fit(
    rules: Any, optimizer: Any, seed: int, steps: int, *, stats: Any = None
) -> tuple[list[float], float, int]:
    """Adapts the pretrained network of a seed to digits turned by 90 degrees.

    Args:
      rules: what is adapted and how, as rules of `sj.adapt`.
      optimizer: an optax transformation; the same object for all seeds compiles once.
      seed: of the network, the adapter and the batches.
      steps: number of steps.
      stats: captured statistics for methods that need them.

    Returns:
      Loss of every step, test accuracy, and the number of trained values.
    """
    turned = load_digits(1)
    adapted = sj.adapt(pretrained(seed), rules, key=jax.random.key(100 + seed), stats=stats)
    trained, losses = fit(adapted, jax.random.key(200 + seed), (turned.x, turned.y), optimizer, steps)
    return np.asarray(losses).tolist(), float(accuracy(trained, turned)), sj.summary(adapted).trainable


def early(losses: Sequence[float]) -> float:
    """Returns the mean loss of steps 20 to 30."""
    return float(np.mean(losses[20:30]))


def run_record(
    method: str, rules: Any, rate: float, optimizer: Any, seed: int, steps: int, *, stats: Any = None
) -> dict[str, Any]:
    """Adapts the network of a seed, see `adapt_and_fit`, and returns what the tables of experiments are made of."""
    losses, reached, count = adapt_and_fit(rules, optimizer, seed, steps, stats=stats)
    found = {"method": method, "learning_rate": rate, "seed": seed, "accuracy": reached}
    return found | {"early_loss": early(losses), "adapter_values": count}
