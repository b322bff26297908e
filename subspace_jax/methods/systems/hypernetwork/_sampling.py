"""Noise schedules and the deterministic sampler."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import RankError, check_int


def cosine_schedule(steps: int) -> jax.Array:
    r"""Returns \(\bar\alpha_t\) of the cosine schedule, from little noise to nearly nothing else.

    Args:
      steps: \(T\).

    Returns:
      `[T]` in float32, falling.

    Example:
      >>> levels = cosine_schedule(100)
      >>> bool(levels[0] > 0.99), bool(levels[-1] < 0.01)
      (True, True)
    """
    steps = check_int("cosine_schedule: steps", steps)
    at = lambda t: jnp.square(jnp.cos((t / steps + 0.008) / 1.008 * jnp.pi / 2))  # noqa: E731
    return jnp.maximum(at(jnp.arange(1.0, steps + 1)) / at(0.0), 1e-5).astype(jnp.float32)


def add_noise(clean: jax.Array, noise: jax.Array, level: jax.Array) -> jax.Array:
    r"""Returns \(x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon\).

    Args:
      clean: \(x_0\), `[n, ...]`.
      noise: \(\epsilon\), likewise.
      level: \(\bar\alpha_t\), `[n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> add_noise(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([0.25])).tolist()
      [[0.5, 0.5]]
    """
    level = level.reshape(-1, *[1] * (clean.ndim - 1))
    return jnp.sqrt(level) * clean + jnp.sqrt(1 - level) * noise


def ddim(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    levels: jax.Array,
    steps: int = 50,
    *,
    clip: float | None = None,
) -> jax.Array:
    r"""Samples by deterministic DDIM: \(x_0\) from the predicted noise, then the same noise at the next level.

    Args:
      predict: returns the noise `[n, ...]` in `x` `[n, ...]` at timesteps `[n]`.
      noise: where to start, `[n, ...]`.
      levels: \(\bar\alpha\), `[T]`.
      steps: how many of the T levels are used, evenly.
      clip: bound of the pixels of \(x_0\); None for latents.

    Returns:
      Samples like `noise`.

    Raises:
      RankError: `steps` is not a positive integer, or above the number of levels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> levels, point = cosine_schedule(20), jnp.array([[1.0, -2.0]])
      >>> exact = lambda x, t: (x - jnp.sqrt(levels[t])[:, None] * point) / jnp.sqrt(1 - levels[t])[:, None]
      >>> ddim(exact, jax.random.normal(jax.random.key(0), (1, 2)), levels, 5).round(3).tolist()
      [[1.0, -2.0]]
    """
    steps = check_int("ddim: steps", steps)
    if steps > levels.shape[0]:
        raise RankError(f"ddim: steps={steps}: expected at most {levels.shape[0]}, the schedule's.")
    times = jnp.round(jnp.linspace(levels.shape[0] - 1, 0, steps)).astype(jnp.int32)
    after = jnp.append(levels[times[1:]], 1.0)

    def one(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        time, next_level = at
        level = levels[time]
        found = predict(x, jnp.full(x.shape[:1], time))
        clean = (x - jnp.sqrt(1 - level) * found) / jnp.sqrt(level)
        if clip is not None:
            clean = jnp.clip(clean, -clip, clip)
            found = (x - jnp.sqrt(level) * clean) / jnp.sqrt(1 - level)
        return jnp.sqrt(next_level) * clean + jnp.sqrt(1 - next_level) * found, None

    return lax.scan(one, noise, (times, after))[0]
