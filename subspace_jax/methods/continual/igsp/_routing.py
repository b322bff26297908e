"""What routers decide: gates, the price of new experts, and which of them stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Of logits that do not count: finite, so that a row where none counts has no NaN.
NEVER = -1e9


def probabilities(logits: jax.Array, active: jax.Array, top: int | None = None) -> jax.Array:
    r"""Returns the softmax over active experts, or over the `top` largest of them.

    Args:
      logits: `[..., experts]`.
      active: which experts there are, zeros and ones or booleans, broadcast to the logits.
      top: number of experts that share the weight; all active ones if None.

    Returns:
      `[..., experts]` in float32: sums to one, exactly zero for experts that are not active, and where none is.

    Example:
      >>> import jax.numpy as jnp
      >>> probabilities(jnp.zeros(4), jnp.array([1.0, 1.0, 0.0, 0.0])).tolist()
      [0.5, 0.5, 0.0, 0.0]
    """
    logits = jnp.where(active > 0, logits.astype(jnp.float32), NEVER)
    if top is not None and top < logits.shape[-1]:
        least = jax.lax.top_k(logits, top)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, NEVER)
    # After the softmax as well: of a row without active experts it is uniform.
    return jax.nn.softmax(logits, axis=-1) * (active > 0)


def subspace_penalty(p: jax.Array, candidates: jax.Array) -> jax.Array:
    r"""Returns the mean probability of new experts, \(\mathrm{mean}_x \sum_{e \in cand} p_e(x)\), in [0, 1].

    Its gradient with respect to a logit \(a_j\) is \(p_j (1[j \in cand] - P_{cand})\): what the old experts can fit is
    drawn to them, and only the rest keeps new ones in use.

    Args:
      p: probabilities `[*rows, experts]`; for several layers of equal weight `[layers, *rows, experts]`.
      candidates: zeros and ones `[experts]`, or `[layers, 1, experts]` and likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> float(subspace_penalty(jnp.array([[0.5, 0.25, 0.25]]), jnp.array([0.0, 1.0, 1.0])))
      0.5
    """
    return jnp.mean(jnp.sum(p * candidates, axis=-1))


def price_at(step: jax.Array | int, steps: int, price: float | jax.Array) -> jax.Array:
    r"""Returns \(\beta\) at a step of the first phase: zero in its first third, then a ramp, then `price`.

    New experts have to become useful before they cost anything.

    Args:
      step: number of the step, from zero.
      steps: \(T_1\), steps of the phase.
      price: \(\beta\) at the end.

    Example:
      >>> [round(float(price_at(s, 90, 3.0)), 2) for s in (0, 30, 45, 60, 89)]
      [0.0, 0.0, 1.5, 3.0, 3.0]
    """
    third = steps / 3
    return jnp.asarray(price, jnp.float32) * jnp.clip((jnp.asarray(step, jnp.float32) - third) / third, 0.0, 1.0)


def prune(
    pi: jax.Array,
    active: jax.Array,
    candidates: jax.Array,
    keep: float | jax.Array = 0.5,
    keep_history: float | jax.Array = 0.0,
    *,
    first: bool | jax.Array = False,
) -> jax.Array:
    r"""Returns which experts a task uses from now on: new ones with \(\pi_e A \geq \kappa\), A experts being active.

    Args:
      pi: mean probability of every expert, `[*stack, experts]`.
      active: zeros and ones, likewise.
      candidates: which of the active experts are new.
      keep: \(\kappa\), relative to a uniform share.
      keep_history: the same for old experts; those that fall below are left out of this task's router alone.
      first: a task without old experts, which keeps at least the best new one.

    Returns:
      Zeros and ones like `active`.

    Example:
      >>> import jax.numpy as jnp
      >>> prune(jnp.array([0.7, 0.25, 0.05]), jnp.ones(3), jnp.array([0.0, 1.0, 1.0])).tolist()
      [1.0, 1.0, 0.0]
    """
    share = pi * jnp.sum(active, -1, keepdims=True)
    stays = jnp.where(candidates > 0, share >= keep, share >= keep_history)
    best = jax.nn.one_hot(jnp.argmax(jnp.where(candidates > 0, pi, -1.0), -1), pi.shape[-1]) * candidates
    stays = stays | ((best > 0) & jnp.asarray(first))
    return jnp.where(stays, active, jnp.zeros_like(active))
