"""The training of a hypernetwork: averaged weights, and one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params


class TrainState(NamedTuple):
    """State of a training; of the hypernetwork alone.

    Attributes:
      params: the hypernetwork's.
      average: their moving average, to sample with.
      opt_state: the optimizer's.
    """

    params: Params
    average: Params
    opt_state: OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the average is a copy.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> init_state({"w": jnp.ones(2)}, optax.sgd(0.1)).average["w"].tolist()
      [1.0, 1.0]
    """
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def train_step(
    state: TrainState,
    loss: Callable[[Params], tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    *,
    decay: float = 0.999,
) -> tuple[TrainState, Any]:
    """Takes one step; call it under `jax.jit`.

    Args:
      state: the state.
      loss: of the hypernetwork's parameters: a scalar and what to report, `denoising_loss` of what they write.
      optimizer: any optax transformation; usual is AdamW at 1e-4 with a decay of 0.01, after clipping at norm 1 and a
        warm-up of 1000 steps. A decay of the hypernetwork's weights does not replace the penalty on what it writes.
      decay: of the moving average.

    Returns:
      The new state, and what the loss reports.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.sgd(0.5)
      >>> state = init_state({"w": jnp.ones(())}, optimizer)
      >>> state, _ = train_step(state, lambda p: (p["w"] ** 2, {}), optimizer, decay=0.5)
      >>> float(state.params["w"]), float(state.average["w"])
      (0.0, 0.5)
    """
    gradients, report = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, optax.incremental_update(params, state.average, 1 - decay), opt_state), report
