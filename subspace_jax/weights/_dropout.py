"""Inverted dropout on the inputs of a weight's learned part, of entries or of whole examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from subspace_jax.core import Lookup, Operation


def step_keys(key: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    """Returns keys for one training step, one per stacked layer."""
    return jax.random.split(key, stack) if stack else key


def drop_inputs(x: jax.Array, operation: Operation, key: jax.Array | None, rate: float) -> jax.Array:
    """Returns an operation's input with some entries dropped and the others scaled up.

    Args:
      x: the input; the indices of a lookup come back as they are.
      operation: of the model on the weight. Every place in the model's program has its own mask.
      key: key of this step; None outside of training.
      rate: probability of dropping an entry.
    """
    if key is None or not rate or isinstance(operation, Lookup):
        return x
    if key.ndim:  # experts contracted together: their inputs are one array, with one mask
        key = key.ravel()[0]
    for index in operation.path:
        key = jax.random.fold_in(key, index)
    mask = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(mask, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_examples(x: jax.Array, operation: Operation, key: jax.Array | None, rate: float) -> jax.Array:
    """Returns activations with whole examples dropped and the others scaled up (stochastic depth).

    Args:
      x: activations whose first axis is that of examples; the indices of a lookup come back as they are. On the input
        of a linear part without bias this is the same as on its output.
      operation: of the model on the weight. Every place in the model's program has its own mask.
      key: key of this step; None outside of training.
      rate: probability of dropping an example.
    """
    if key is None or not rate or isinstance(operation, Lookup):
        return x
    key = jax.random.fold_in(key.ravel()[0] if key.ndim else key, 1 << 20)
    for index in operation.path:
        key = jax.random.fold_in(key, index)
    mask = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], *(1,) * (x.ndim - 1)))
    return jnp.where(mask, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
