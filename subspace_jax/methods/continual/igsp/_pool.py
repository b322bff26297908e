"""What a learner does to one pool: new experts, what learns, the complement of old ones, pruning."""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from subspace_jax.core import is_tracer
from subspace_jax.methods.continual.igsp._method import draw_down
from subspace_jax.methods.continual.igsp._routing import prune
from subspace_jax.methods.continual.igsp._weight import ExpertPool

# Singular values of the old experts' columns below this share of the largest are rounding.
TOLERANCE = 1e-6


class PoolMemory(NamedTuple):
    """What the learner keeps of one pool beside its arrays.

    Attributes:
      pi: `[*stack, experts]`, moving mean of the router's probabilities in the current task.
      basis: `[*stack, in, columns]`, orthonormal columns that span the inputs that old experts read, and zeros;
        columns are none unless the learner needs them.
    """

    pi: jax.Array
    basis: jax.Array


def init_memory(pool: ExpertPool, orthogonal: bool) -> PoolMemory:
    """Returns the memory before the first task."""
    *stack, experts, inputs, size = pool.down.shape
    columns = min(inputs, experts * size) if orthogonal else 0
    return PoolMemory(jnp.zeros((*stack, experts)), jnp.zeros((*stack, inputs, columns)))


def expand(pool: ExpertPool, task: int, count: int, key: jax.Array) -> ExpertPool:
    """Returns the pool with new experts in its first free slots, and the task's router over them and all old ones."""
    history = jnp.any(pool.active[..., :task, :] > 0, axis=-2)
    slots = jnp.argsort(history, axis=-1, stable=True)[..., :count]
    new = jnp.sum(jax.nn.one_hot(slots, history.shape[-1]), axis=-2)
    drawn = draw_down(key, pool.down.shape, pool.down.dtype)
    free = jnp.logical_not(history)

    def renewed(name: str, value: jax.Array | float) -> jax.Array:
        old = getattr(pool, name)
        mask = free.reshape(*free.shape, *[1] * (old.ndim - free.ndim))
        return jnp.where(mask, jnp.asarray(value, old.dtype), old)

    return dataclasses.replace(
        pool,
        down=renewed("down", drawn),
        **{name: renewed(name, 0.0) for name in ("down_bias", "up", "up_bias")},
        active=pool.active.at[..., task, :].set(jnp.where(history, 1.0, new)),
        candidates=new.astype(pool.candidates.dtype),
        task=jnp.full_like(pool.task, task),
        noise=jnp.ones_like(pool.noise),
        settled=jnp.zeros_like(pool.settled),
    )


def old_columns(pool: ExpertPool, task: int, columns: int, path: str) -> jax.Array:
    """Returns an orthonormal basis of what the experts of earlier tasks read, `[*stack, in, columns]`, with zeros.

    Of experts that are there alone: a basis of the padded pool would have directions of empty slots.
    """
    history = jnp.any(pool.active[..., :task, :] > 0, axis=-2)[..., None, None]
    down = jnp.where(history, pool.down.astype(jnp.float32), 0.0)
    joined = jnp.moveaxis(down, -3, -2).reshape(*down.shape[:-3], down.shape[-2], -1)
    u, s, _ = jnp.linalg.svd(joined, full_matrices=False)
    held = s > TOLERANCE * jnp.max(s, -1, keepdims=True)
    if not is_tracer(held) and np.any(np.asarray(held.sum(-1)) == u.shape[-2]):
        warnings.warn(
            f"{path}: igsp: the experts of {task} tasks read every direction of {u.shape[-2]} inputs, so nothing is "
            "left for new ones with orth_residual=True. Make experts smaller, or leave it out.",
            stacklevel=4,
        )
    return (u * held[..., None, :])[..., :columns]


def outside(matrix: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns matrices `[*stack, experts, in, size]` without their part in a basis `[*stack, in, columns]`."""
    basis = basis[..., None, :, :]
    wide = matrix.astype(jnp.float32)
    for _ in range(2):  # the second time takes away what rounding has left
        inner = jnp.matmul(jnp.swapaxes(basis, -1, -2), wide, precision=lax.Precision.HIGHEST)
        wide = wide - jnp.matmul(basis, inner, precision=lax.Precision.HIGHEST)
    return wide.astype(matrix.dtype)


def settle(pool: ExpertPool, memory: PoolMemory, keep: float, keep_history: float, orthogonal: bool) -> ExpertPool:
    """Returns the pool at the end of the first phase: experts that are not needed are gone, noise is off."""
    active = pool.active[..., pool.task, :]
    now = prune(memory.pi, active, pool.candidates, keep, keep_history, first=pool.task == 0)
    kept = pool.candidates * now
    down = pool.down
    if orthogonal:
        down = jnp.where(kept[..., None, None] > 0, outside(down, memory.basis), down)
    return dataclasses.replace(
        pool,
        down=down,
        active=pool.active.at[..., pool.task, :].set(now),
        candidates=kept,
        noise=jnp.zeros_like(pool.noise),
        settled=jnp.ones_like(pool.settled),
    )


def learning(pool: ExpertPool, values: ExpertPool) -> ExpertPool:
    """Returns gradients or updates of a pool, zero but for the task's own experts and its router's columns for them."""
    new, task = pool.candidates, jax.nn.one_hot(pool.task, pool.active.shape[-2])
    routed = (task[:, None] * pool.active)[..., None, :]
    masks = {"down": new[..., None, None], "down_bias": new[..., None], "up": new[..., None, None]}
    masks |= {"up_bias": new[..., None], "router": routed, "noise_router": routed}
    held = {name: getattr(values, name) for name in masks if getattr(values, name) is not None}
    return dataclasses.replace(values, **{n: jnp.where(masks[n] > 0, v, jnp.zeros_like(v)) for n, v in held.items()})


def averaged(pi: jax.Array, mean: jax.Array, first: jax.Array, decay: float) -> jax.Array:
    """Returns the moving mean of probabilities, which starts with the first batch's."""
    return jnp.where(first, mean, decay * pi + (1 - decay) * mean)
