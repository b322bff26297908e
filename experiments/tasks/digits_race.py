"""Optimizers on one small network that learns the 8x8 digits from nothing: the same steps for every arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runner import Context
from experiments.tasks import digits_task

# What becomes of gradients before the optimizer sees them.
Spoil = Callable[[Any, jax.Array], Any]


def network(width: int, seed: int) -> Any:
    """Returns a fresh network 64-width-width-10."""
    rng, sizes = np.random.default_rng(seed), (64, width, width, 10)
    names = ("hidden_0", "hidden_1", "out")
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(i, o)) * np.sqrt(2 / i), jnp.float32),
            "bias": jnp.zeros(o),
        }
        for name, i, o in zip(names, sizes, sizes[1:], strict=False)
    }


def training(
    transformation: optax.GradientTransformation, steps: int, batch_size: int, spoil: Spoil | None = None
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns `train(params, key, x, y, rate)`, one compiled program for all rates and seeds.

    Args:
      transformation: the optimizer without its learning rate.
      steps: of training.
      batch_size: digits of a step.
      spoil: changes gradients, given a key.

    Returns:
      A function to the trained network and the losses of all steps.
    """

    @jax.jit
    def train(params: Any, key: jax.Array, x: jax.Array, y: jax.Array, rate: jax.Array) -> tuple[Any, jax.Array]:
        optimizer = optax.chain(transformation, optax.scale_by_learning_rate(rate))

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            rows = jax.random.randint(key, (batch_size,), 0, len(x))

            def loss(params: Any) -> jax.Array:
                logits = digits_task.network(params, x[rows])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

            value, gradients = jax.value_and_grad(loss)(params)
            if spoil is not None:
                gradients = spoil(gradients, jax.random.fold_in(key, 1))
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
        return params, losses

    return train


def race(
    arms: Mapping[str, optax.GradientTransformation],
    context: Context,
    *,
    width: int,
    steps: int,
    batch_size: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    spoil: Spoil | None = None,
) -> list[dict[str, Any]]:
    """Trains every arm at every rate from every seed, and returns loss, accuracy and size of the state of each run.

    The loss is the mean of the last 20 steps.
    """
    digits, runs = digits_task.load_digits(), []
    trainers = {name: training(one, steps, batch_size, spoil) for name, one in arms.items()}
    jobs = [(name, rate) for name in trainers for rate in rates]
    for name, rate in context.track(jobs, "digits"):
        for seed in seeds:
            params = network(width, seed)
            trained, losses = trainers[name](params, jax.random.key(seed), digits.x, digits.y, jnp.float32(rate))
            state = jax.eval_shape(arms[name].init, params)
            logits = digits_task.network(trained, digits.x_test)
            runs.append(
                {
                    **{"method": name, "learning_rate": rate, "seed": seed, "loss": float(jnp.mean(losses[-20:]))},
                    "accuracy": float(jnp.mean(logits.argmax(-1) == digits.y_test)),
                    "state_values": int(sum(v.size for v in jax.tree.leaves(state))),
                }
            )
    return runs
