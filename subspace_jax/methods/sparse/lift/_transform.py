"""Adam as LIFT trains with it: epsilon is added before the bias is corrected, as Hugging Face's AdamW does."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Updates, check_choice
from subspace_jax.optim import filled, like_updates, with_rate

EpsMode = Literal["hf", "optax"]


class ScaleByLiftAdamState(NamedTuple):
    """State of `scale_by_lift_adam`.

    Attributes:
      count: int32 scalar, steps taken; a selection of new entries does not reset it.
      mu: first moments, as the parameters.
      nu: second moments, as the parameters.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_lift_adam(
    b1: float = 0.9, b2: float = 0.95, eps: float = 1e-6, eps_mode: EpsMode = "hf"
) -> optax.GradientTransformation:
    r"""Returns Adam's direction with a choice of where epsilon goes.

    "hf": \(\sqrt{1-\beta_2^t} / (1-\beta_1^t) \cdot m / (\sqrt{v} + \epsilon)\), the released optimizer's; "optax":
    \(\hat m / (\sqrt{\hat v} + \epsilon)\). They differ while \(t\) is small or gradients are as small as epsilon.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: \(\epsilon\).
      eps_mode: "hf" or "optax".

    Returns:
      An optax transformation; moments have the dtype of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> transform = scale_by_lift_adam()
      >>> updates, _ = transform.update(jnp.array([4.0]), transform.init(jnp.array([1.0])))
      >>> round(float(updates[0]), 4)
      1.0
    """
    check_choice("scale_by_lift_adam: eps_mode", eps_mode, ("hf", "optax"))

    def init(params: Params) -> ScaleByLiftAdamState:
        zeros = optax.tree.zeros_like(params)
        return ScaleByLiftAdamState(jnp.zeros((), jnp.int32), zeros, optax.tree.zeros_like(params))

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, OptState]:
        del params
        held = [like_updates(updates, tree) for tree in (state.mu, state.nu)]
        mu = jax.tree.map(lambda g, m: (b1 * m + (1 - b1) * g).astype(m.dtype), updates, held[0])
        nu = jax.tree.map(lambda g, v: (b2 * v + (1 - b2) * g * g).astype(v.dtype), updates, held[1])
        count = jnp.asarray(optax.safe_increment(state.count))
        first, root = 1 - b1**count, jnp.sqrt(1 - b2**count)
        shift = eps if eps_mode == "hf" else eps * root
        directions = jax.tree.map(lambda m, v: (root / first * m / (jnp.sqrt(v) + shift)).astype(m.dtype), mu, nu)
        return directions, ScaleByLiftAdamState(count, filled(mu, state.mu), filled(nu, state.nu))

    return optax.GradientTransformation(init, update)


def lift_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-6,
    eps_mode: EpsMode = "hf",
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optimizer of LIFT with its published constants.

    Published rates are 5e-5 to 2e-4 with a linear decay after a warm-up over 3 % of the steps.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment; see `scale_by_lift_adam`.
      eps_mode: "hf", before the bias is corrected, or "optax".
      weight_decay: decoupled decay of the trained values alone.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = lift_adam(1e-3)
      >>> updates, _ = optimizer.update(jnp.array([-4.0]), optimizer.init(jnp.array([1.0])), jnp.array([1.0]))
      >>> round(float(updates[0]), 6)
      0.001

    References:
      Loshchilov, Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    return with_rate(scale_by_lift_adam(b1, b2, eps, eps_mode), learning_rate, weight_decay)
