"""A whole training run as one compiled loop, for models small enough that starting a step costs more than the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from subspace_jax.core import Batch, OptState, Params, PyTree, combine, partition


class ScanResult(NamedTuple):
    """The end of a run of `scan_steps`.

    Attributes:
      adapted: the tree with its trained stand-in weights.
      losses: `[steps]`, the loss before every step.
      opt_state: the optimizer's state.
    """

    adapted: Any
    losses: jax.Array
    opt_state: Any


def scan_steps(
    loss: Callable[[Params, Batch], jax.Array],
    optimizer: optax.GradientTransformation,
    adapted: Params,
    inputs: PyTree = None,
    *,
    steps: int | None = None,
    opt_state: OptState = None,
) -> ScanResult:
    """Trains what learns of a tree by `jax.lax.scan`; call it under `jax.jit`, and `jax.vmap` it over seeds or rates.

    Args:
      loss: `loss(adapted, input)`, a scalar.
      optimizer: any optax transformation.
      adapted: the tree from `sj.adapt`.
      inputs: arrays with a leading axis of steps, of which each step gets one slice: batches, or keys that draw them.
      steps: number of steps where there are no inputs; `loss` then gets None.
      opt_state: the optimizer's state to go on from; begins anew if None.

    Returns:
      The trained tree, the losses and the optimizer's state.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones(3)}, {"w": sj.full()}, key=jax.random.key(0))
      >>> loss = lambda tree, x: jnp.sum((tree["w"].value * x) ** 2)
      >>> end = jax.jit(lambda tree, x: scan_steps(loss, optax.sgd(0.25), tree, x))(adapted, jnp.ones((2, 3)))
      >>> end.losses.tolist(), end.adapted["w"].value.tolist()
      ([3.0, 0.75], [0.25, 0.25, 0.25])
    """
    trainable, frozen = partition(adapted)

    def step(carry: PyTree, one: Batch) -> tuple[PyTree, jax.Array]:
        trainable, state = carry
        value, gradients = jax.value_and_grad(lambda t: loss(combine(t, frozen), one))(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    start = optimizer.init(trainable) if opt_state is None else opt_state
    (trainable, state), losses = jax.lax.scan(step, (trainable, start), inputs, length=steps)
    return ScanResult(combine(trainable, frozen), losses, state)
