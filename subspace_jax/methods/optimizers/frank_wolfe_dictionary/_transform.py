"""Frank-Wolfe steps on the ball of the spectral norm, as an optimizer of any matrix."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import Role, check_choice
from subspace_jax.linalg import PolarMethod, polar
from subspace_jax.optim import MatrixStep, Parts, scale_matrices, with_rate


def scale_by_spectral_frank_wolfe(
    radius: float = 1.0,
    *,
    averaging: float = 0.5,
    polar_method: PolarMethod = "svd",
    largest: int = 8192,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    r"""Returns the Frank-Wolfe direction on the spectral-norm ball, from an averaged gradient.

    \(H \leftarrow (1 - \rho_t) H + \rho_t G\), \(\rho_t = t^{-1/2}\), and the direction is
    \(W + r\,\mathrm{polar}(H)\): a step \(-\gamma\) along it is \((1 - \gamma) W - \gamma\,r\,\mathrm{polar}(H)\),
    which stays in the ball of radius \(r\) for \(\gamma \le 1\). Muon with decoupled weight decay is the same, with
    \(r = 1 / \lambda\) and \(\gamma = \eta \lambda\).
    Everything that is no matrix has Adam's direction.

    Args:
      radius: \(r\).
      averaging: exponent of \(\rho_t\); 0 takes each gradient as it is.
      polar_method: "svd", or "newton_schulz" by products alone.
      largest: matrices with a longer side than this have Adam.
      b1: decay of the first moment of Adam.
      b2: decay of its second moment.
      eps: added to the root of its second moment.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ValueError: an unknown `polar_method`; at `update`, `params` is missing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.frank_wolfe_dictionary.scale_by_spectral_frank_wolfe()
      >>> w = {"w": jnp.eye(2)}
      >>> updates, _ = optimizer.update(w, optimizer.init(w), w)
      >>> updates["w"].round(4).tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    check_choice("scale_by_spectral_frank_wolfe: polar_method", polar_method, ("svd", "newton_schulz"))

    def step(gradient: jax.Array, parts: Parts, at: MatrixStep) -> tuple[jax.Array, Parts]:
        assert at.param is not None
        rho = jnp.minimum(1.0, at.count.astype(jnp.float32) ** -averaging)
        averaged = (1 - rho) * parts["gradient"] + rho * gradient
        return at.param + radius * polar(averaged, polar_method), {"gradient": averaged}

    return scale_matrices(
        lambda zeros, path: {"gradient": zeros},
        step,
        largest=largest,
        b1=b1,
        b2=b2,
        eps=eps,
        needs_params=True,
        roles=roles,
    )


def frank_wolfe_schedule(exponent: float = 0.75) -> optax.Schedule:
    r"""Returns the step sizes \(\gamma_t = (t + 1)^{-3/4}\), \(t\) from 1.

    Args:
      exponent: 3/4, which goes with averaging by \(t^{-1/2}\).

    Example:
      >>> [round(float(frank_wolfe_schedule()(t)), 4) for t in (0, 1)]
      [0.5946, 0.4387]
    """
    return lambda count: (jnp.asarray(count, jnp.float32) + 2.0) ** -exponent


def spectral_frank_wolfe(
    learning_rate: optax.ScalarOrSchedule | None = None,
    radius: float = 1.0,
    *,
    averaging: float = 0.5,
    polar_method: PolarMethod = "svd",
    largest: int = 8192,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Frank-Wolfe on the spectral ball: \(W \leftarrow (1 - \gamma_t) W - \gamma_t\,r\,\mathrm{polar}(H)\).

    Args:
      learning_rate: \(\gamma_t\), at most 1; \((t + 1)^{-3/4}\) if None, which is large: mask what is no matrix, whose
        Adam has it as its learning rate.
      radius: \(r\).
      averaging: exponent of \(\rho_t\).
      polar_method: "svd" or "newton_schulz".
      largest: matrices with a longer side than this have Adam.
      b1: decay of the first moment of Adam.
      b2: decay of the second moment of Adam.
      eps: added to the root of the second moment of Adam.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation whose `update` needs `params`; they have to start inside the ball to stay there.

    Raises:
      ValueError: an unknown `polar_method`; at `update`, `params` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = sj.methods.frank_wolfe_dictionary.spectral_frank_wolfe()
      >>> params = {"w": jnp.zeros((3, 2))}
      >>> updates, _ = optimizer.update({"w": jnp.eye(3, 2)}, optimizer.init(params), params)
      >>> round(float(jnp.linalg.norm(optax.apply_updates(params, updates)["w"], 2)), 4)
      0.5946
    """
    direction = scale_by_spectral_frank_wolfe(
        radius,
        averaging=averaging,
        polar_method=polar_method,
        largest=largest,
        b1=b1,
        b2=b2,
        eps=eps,
        roles=roles,
    )
    return with_rate(direction, frank_wolfe_schedule() if learning_rate is None else learning_rate)
