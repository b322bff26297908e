"""Hyperparameters that may be numbers, or traced by `optax.inject_hyperparams`."""

from __future__ import annotations

from typing import Any

import optax


def is_zero(value: Any) -> bool:
    """Tells whether a hyperparameter is known to be zero; a traced one is not.

    Example:
      >>> import jax.numpy as jnp
      >>> is_zero(0.0), is_zero(None), is_zero(jnp.zeros(()))
      (True, True, False)
    """
    return value is None or (isinstance(value, (int, float)) and value == 0)


def with_rate(
    direction: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, weight_decay: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Chains a direction with decoupled weight decay and a learning rate, as every alias does.

    Args:
      direction: a `scale_by_` transformation.
      learning_rate: a number or a schedule.
      weight_decay: times the parameters, on top of the direction; none if zero.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = with_rate(optax.identity(), 0.5, 0.1)
      >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
      >>> updates.tolist()
      [-0.550000011920929, -0.550000011920929]
    """
    decay = [] if is_zero(weight_decay) else [optax.add_decayed_weights(weight_decay)]
    return optax.chain(direction, *decay, optax.scale_by_learning_rate(learning_rate))
