"""Guidance by two models: the personalized one for the subject, the untouched one for the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params


def hybrid_guidance(
    conditional: jax.Array,
    unconditional: jax.Array,
    base_conditional: jax.Array,
    base_unconditional: jax.Array,
    subject: float | jax.Array,
    prompt: float | jax.Array,
) -> jax.Array:
    r"""Returns \(\epsilon_p(c_0) + w_p\,[\epsilon_p(c) - \epsilon_p(c_0)] + w_b\,[\epsilon_0(c') - \epsilon_0(c_0)]\).

    With \(w_b = 0\) it is ordinary guidance of the personalized model, whose unconditional prediction is where it
    starts from; the base model adds a direction only. The published combination was not to be had; this is the simplest
    one that reduces to it.

    Args:
      conditional: \(\epsilon_p(c)\), of the personalized model at the prompt with the subject's token.
      unconditional: \(\epsilon_p(c_0)\), without a prompt.
      base_conditional: \(\epsilon_0(c')\), of the base model at the prompt with the class noun alone.
      base_unconditional: \(\epsilon_0(c_0)\).
      subject: \(w_p\).
      prompt: \(w_b\).

    Returns:
      An array like the predictions.

    Example:
      >>> import jax.numpy as jnp
      >>> float(hybrid_guidance(*map(jnp.asarray, (3.0, 1.0, 2.5, 2.0)), subject=2.0, prompt=4.0))
      7.0
    """
    own, other = conditional - unconditional, base_conditional - base_unconditional
    return unconditional + subject * own + prompt * other


def hybrid_predictor(
    run: Callable[..., jax.Array],
    bank: Params,
    rows: jax.Array,
    condition: Any,
    plain: Any,
    null: Any,
    subject: float | Callable[[jax.Array], Any] = 3.0,
    prompt: float | Callable[[jax.Array], Any] = 3.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    r"""Returns the guided model as a function of noisy images and timesteps, for `ddim`.

    The four predictions are one batch: a sample's subject twice, and slot 0, the model itself, twice.

    Args:
      run: `sj.per_row(fn)` of the model, `fn(params, x, t, condition)`.
      bank: from `personalized`.
      rows: slots of the samples, `[n]`; subject i has i + 1.
      condition: \(c\), arrays `[n, ...]`: the prompt with the subject's token.
      plain: \(c'\), likewise: without that token, which the base model does not know.
      null: \(c_0\), likewise.
      subject: \(w_p\), or a function of the timesteps `[n]`; 3 for latents, 1 on the pixels of digits.
      prompt: \(w_b\), likewise; 3, and 0.5.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> home, params = sj.methods.hypernetwork, {"w": jnp.eye(2)}
      >>> layout = home.layout_of(params, "w", rank=1)
      >>> bank = home.personalized(params, layout, jnp.zeros((1, layout.size)))
      >>> run = sj.per_row(lambda p, x, t, c: (x + c) @ p["w"])
      >>> c, zero = jnp.ones((1, 2)), jnp.zeros((1, 2))
      >>> home.hybrid_predictor(run, bank, jnp.array([1]), c, c, zero, 2.0, 1.0)(zero, jnp.array([5])).tolist()
      [[3.0, 3.0]]
    """
    slots = jnp.concatenate([rows, rows, jnp.zeros_like(rows), jnp.zeros_like(rows)])
    conditions = jax.tree.map(lambda *parts: jnp.concatenate(parts), condition, null, plain, null)

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        found = run(bank, slots, jnp.concatenate([x] * 4), jnp.concatenate([t] * 4), conditions)
        weights = [_at(w, t, x.ndim) for w in (subject, prompt)]
        return hybrid_guidance(*jnp.split(found, 4), *weights)

    return predict


def _at(weight: Any, t: jax.Array, ndim: int) -> Any:
    if not callable(weight):
        return weight
    found = jnp.asarray(weight(t))
    return found.reshape(-1, *[1] * (ndim - 1)) if found.ndim else found
