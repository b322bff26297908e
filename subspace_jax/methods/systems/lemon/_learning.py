"""Normalization, the loss, and training: jointly on all families, or on a few samples of a new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import check_int, check_number

_SMALLEST = 1e-6


class Batch(NamedTuple):
    """Trajectories as the network takes them, raw.

    Attributes:
      inputs: frames, `[n, frames, points]`.
      input_times: `[frames]` or `[n, frames]`.
      targets: frames, `[n, queries, points]`.
      target_times: `[queries]` or `[n, queries]`.
      tokens: of the equations, `[n, length]`.
      mask: `[n, length]`.
    """

    inputs: jax.Array
    input_times: jax.Array
    targets: jax.Array
    target_times: jax.Array
    tokens: jax.Array
    mask: jax.Array


def input_statistics(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of each sample's input frames, over time and space.

    Args:
      inputs: `[n, frames, points]`.

    Returns:
      Both `[n, 1, 1]`; the deviation divides by the number of values less one, and has 1e-6 added.

    Example:
      >>> import jax.numpy as jnp
      >>> mean, deviation = input_statistics(jnp.array([[[1.0, 3.0]]]))
      >>> mean.item(), round(deviation.item(), 4)
      (2.0, 1.4142)
    """
    inputs = inputs.astype(jnp.float32)
    return (
        jnp.mean(inputs, axis=(1, 2), keepdims=True),
        jnp.std(inputs, axis=(1, 2), keepdims=True, ddof=1) + _SMALLEST,
    )


def predict(apply: Callable[..., jax.Array], params: Any, batch: Batch) -> jax.Array:
    """Returns predicted frames in the units of the data.

    Args:
      apply: `apply({"params": params}, frames, times, queries, tokens, mask)`, such as that of a `Lemon`, perhaps
        through `sj.with_adapters`.
      params: its parameters.
      batch: trajectories; targets are not read.

    Returns:
      `[n, queries, points]`.
    """
    mean, deviation = input_statistics(batch.inputs)
    frames = (batch.inputs - mean) / deviation
    found = apply({"params": params}, frames, batch.input_times, batch.target_times, batch.tokens, batch.mask)
    return found * deviation + mean


def lemon_loss(apply: Callable[..., jax.Array], params: Any, batch: Batch) -> jax.Array:
    """Returns the mean squared error in the units of normalized inputs, float32.

    Args:
      apply: as of `predict`.
      params: as of `predict`.
      batch: trajectories.

    Returns:
      A scalar.
    """
    mean, deviation = input_statistics(batch.inputs)
    frames = (batch.inputs - mean) / deviation
    found = apply({"params": params}, frames, batch.input_times, batch.target_times, batch.tokens, batch.mask)
    return jnp.mean(jnp.square(found - (batch.targets - mean) / deviation))


def relative_errors(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Returns \(\|\hat u - u\|_2 / \|u\|_2\) of each sample, `[n]`.

    Args:
      predicted: `[n, ...]`.
      targets: the same.

    Example:
      >>> import jax.numpy as jnp
      >>> relative_errors(jnp.array([[3.0, 5.0]]), jnp.array([[3.0, 4.0]]))
      Array([0.2], dtype=float32)
    """
    axes = tuple(range(1, targets.ndim))
    missed = jnp.sqrt(jnp.sum(jnp.square(predicted - targets), axes))
    return missed / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(targets), axes)), 1e-12)


def warmup_cosine(steps: int, peak: float = 1e-4, warmup: float = 0.1) -> optax.Schedule:
    """Returns the learning rate of training: up in a line over a tenth of the steps, then down a cosine to zero.

    Args:
      steps: of the whole training.
      peak: largest rate.
      warmup: share of the steps.

    Example:
      >>> rate = warmup_cosine(100)
      >>> float(rate(0)), round(float(rate(10)), 6), round(float(rate(100)), 6)
      (0.0, 0.0001, 0.0)
    """
    steps = check_int("warmup_cosine: steps", steps)
    check_number("warmup_cosine: warmup", warmup, least=0.0, below=1.0)
    rise = min(int(warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0 if rise else peak, peak, rise, steps)


@functools.partial(jax.jit, static_argnums=(0, 4, 5), static_argnames=("weight_decay",))
def train(
    loss: Callable[[Any, Any, Any], jax.Array],
    trainable: Any,
    frozen: Any,
    data: Any,
    steps: int,
    batch_size: int | None,
    key: jax.Array,
    learning_rate: float | jax.Array = 1e-4,
    *,
    weight_decay: float = 1e-4,
) -> tuple[Any, jax.Array]:
    """Trains by AdamW (epsilon 1e-6, clip 1) on random batches of stacked data, in one program.

    The same rule pretrains on all families at once and tunes on a few samples of a new one.

    Args:
      loss: `loss(trainable, frozen, batch)`, a scalar.
      trainable: parameters that learn.
      frozen: what does not.
      data: a tree of arrays with one leading axis of samples.
      steps: optimizer steps.
      batch_size: samples of a step, drawn with replacement; None for all of them.
      key: of the draws.
      learning_rate: its peak; see `warmup_cosine`.
      weight_decay: of AdamW.

    Returns:
      The trained parameters and the loss of every step, `[steps]`.
    """
    shape = warmup_cosine(steps, 1.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda count: learning_rate * shape(count), eps=1e-6, weight_decay=weight_decay),
    )
    size = jax.tree.leaves(data)[0].shape[0]

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        values, state = carry
        batch = data
        if batch_size is not None:
            rows = jax.random.randint(key, (batch_size,), 0, size)
            batch = jax.tree.map(lambda leaf: leaf[rows], data)
        value, gradient = jax.value_and_grad(loss)(values, frozen, batch)
        updates, state = optimizer.update(gradient, state, values)
        return (optax.apply_updates(values, updates), state), value

    (values, _), losses = jax.lax.scan(step, (trainable, optimizer.init(trainable)), jax.random.split(key, steps))
    return values, losses
