"""What trains a hypernetwork: the denoising error of the model that it writes, and the size of what it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, check_choice, check_number, check_probability
from subspace_jax.linalg import wide_matmul
from subspace_jax.methods.systems.hypernetwork._layout import Layout, unflatten
from subspace_jax.methods.systems.hypernetwork._personalize import personalized
from subspace_jax.methods.systems.hypernetwork._sampling import add_noise

Penalty = Literal["output", "delta"]


def output_penalty(layout: Layout, output: jax.Array, kind: Penalty = "output") -> jax.Array:
    r"""Returns the mean over subjects of \(\|o\|^2\), or of \(\sum_l \|s A_l B_l\|_F^2\), in float32.

    The second by Gram matrices of the rank's size, \(s^2\,\mathrm{tr}\,(A^T A)(B B^T)\). Sums, not means, over the
    numbers of a subject.

    Args:
      layout: of the kernels.
      output: \(o\), `[subjects, size]`.
      kind: "output" or "delta".

    Example:
      >>> import jax.numpy as jnp
      >>> from subspace_jax.methods.systems.hypernetwork import layout_of
      >>> layout = layout_of({"w": jnp.ones((2, 2))}, "w", rank=1)
      >>> [round(float(output_penalty(layout, jnp.ones((3, 4)), kind)), 4) for kind in ("output", "delta")]
      [4.0, 0.02]
    """
    check_choice("output_penalty: kind", kind, ("output", "delta"))
    output = output.astype(jnp.float32)
    if kind == "output":
        return jnp.mean(jnp.sum(jnp.square(output), axis=-1))
    total = jnp.zeros(output.shape[0])
    for a, b in unflatten(layout, output).values():
        left, right = wide_matmul(jnp.swapaxes(a, -1, -2), a), wide_matmul(b, jnp.swapaxes(b, -1, -2))
        total = total + jnp.sum((left * right).reshape(output.shape[0], -1), axis=-1)
    return layout.scale**2 * jnp.mean(total)


def denoising_loss(
    run: Callable[..., jax.Array],
    params: Params,
    layout: Layout,
    output: jax.Array,
    rows: jax.Array,
    clean: jax.Array,
    condition: Any,
    null: Any,
    levels: jax.Array,
    key: jax.Array,
    *,
    penalty: float | jax.Array = 1e-5,
    kind: Penalty = "output",
    condition_dropout: float = 0.1,
    reference_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Returns \(\mathrm{mean}\,\|\epsilon_{\theta_0 + \Delta(o)}(x_t, t, c) - \epsilon\|^2 + \lambda\,\|o\|^2\).

    There are no fine-tuned weights of subjects to regress to: the error of what the written model predicts trains the
    hypernetwork end to end, and the penalty keeps the written model near the base. Take as reference another image of
    the subject than the target, or what is learned is to copy.

    Args:
      run: `sj.per_row(fn)` of the model, `fn(params, x, t, condition)`, which predicts noise.
      params: the frozen model's; they get no gradient.
      layout: of its kernels.
      output: \(o\), `[subjects, size]`, what the hypernetwork writes from references.
      rows: slots of the targets, `[n]`: i + 1 for subject i, as in `personalized`.
      clean: \(x_0\), targets `[n, ...]`.
      condition: \(c\), arrays `[n, ...]`.
      null: \(c_0\), likewise.
      levels: \(\bar\alpha\), `[T]`.
      key: draws timesteps, noise and what is dropped, for every sample on its own; consumed.
      penalty: \(\lambda\), on the sum of squares of numbers of order one.
      kind: of the penalty, see `output_penalty`.
      condition_dropout: probability that a sample's condition is the empty one, so that guidance is possible.
      reference_dropout: probability that a sample uses the model itself.

    Returns:
      A scalar in float32, and its parts "denoising" and "penalty".

    Raises:
      ValueError: an option is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> home, params = sj.methods.hypernetwork, {"w": jnp.eye(2)}
      >>> layout = home.layout_of(params, "w", rank=1)
      >>> run = sj.per_row(lambda p, x, t, c: (x + c) @ p["w"])
      >>> c = jnp.zeros((3, 2))
      >>> rows, levels = jnp.array([1, 1, 2]), home.cosine_schedule(10)
      >>> o = jnp.zeros((2, layout.size))
      >>> loss, parts = home.denoising_loss(run, params, layout, o, rows, c + 1, c, c, levels, jax.random.key(0))
      >>> sorted(parts), bool(loss == parts["denoising"])
      (['denoising', 'penalty'], True)
    """
    check_number("denoising_loss: penalty", penalty, least=0.0)
    check_probability("denoising_loss: condition_dropout", condition_dropout)
    check_probability("denoising_loss: reference_dropout", reference_dropout)
    count, keys = clean.shape[0], jax.random.split(key, 4)
    t = jax.random.randint(keys[0], (count,), 0, levels.shape[0])
    noise = jax.random.normal(keys[1], clean.shape)
    empty = jax.random.bernoulli(keys[2], condition_dropout, (count,))
    condition = jax.tree.map(lambda c, n: jnp.where(empty.reshape(-1, *[1] * (c.ndim - 1)), n, c), condition, null)
    if reference_dropout:
        rows = jnp.where(jax.random.bernoulli(keys[3], reference_dropout, (count,)), 0, rows)
    found = run(personalized(params, layout, output), rows, add_noise(clean, noise, levels[t]), t, condition)
    error = jnp.mean(jnp.square(found.astype(jnp.float32) - noise))
    size = output_penalty(layout, output, kind)
    return error + penalty * size, {"denoising": error, "penalty": size}
