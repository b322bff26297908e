"""Trees with pools: whose router counts, what is stored of them, and pools without their empty slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, StructureError, leaves_with_paths, map_with_paths
from subspace_jax.methods.continual.igsp._weight import ExpertPool


def pools(params: Params) -> dict[str, ExpertPool]:
    """Returns the pools of a tree by path.

    Raises:
      StructureError: there are none.
    """
    found = {path: leaf for path, leaf in leaves_with_paths(params) if isinstance(leaf, ExpertPool)}
    if not found:
        raise StructureError("igsp: the tree has no pool of experts; put some in by adapt with igsp(...).")
    return found


def at_task(params: Params, task: int | jax.Array) -> Params:
    """Returns the tree as it is used for a task, without noise.

    Args:
      params: a tree with pools, from the learner or `compact`.
      task: number of a task; or one for every sample, `[batch]`, from `select_task`; -1 for the model alone.

    Raises:
      StructureError: there are no pools, or a number is beyond the tasks that they have room for.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.igsp.igsp(2, tasks=2)
      >>> tree = sj.adapt({"w": jnp.ones((3, 3))}, {"w": method}, key=jax.random.key(0))
      >>> int(at_task(tree, -1)["w"].task)
      -1
    """
    tasks = next(iter(pools(params).values())).active.shape[-2]
    if isinstance(task, int) and not -1 <= task < tasks:
        raise StructureError(f"at_task({task}): expected 0 to {tasks - 1}, the tasks of the pools, or -1 for none.")
    values: dict[str, Any] = {
        "task": jnp.asarray(task, jnp.int32),
        "settled": jnp.ones([], jnp.float32),
        "dropout_key": None,
    }
    return map_pools(params, lambda path, pool: dataclasses.replace(pool, **values))


def map_pools(params: Params, change: Callable[[str, ExpertPool], ExpertPool]) -> Params:
    """Returns the tree with every pool replaced by `change(path, pool)`."""
    return map_with_paths(lambda path, leaf: change(path, leaf) if isinstance(leaf, ExpertPool) else leaf, params)


def kept_experts(params: Params) -> dict[str, np.ndarray]:
    """Returns the number of experts that tasks have added, by path of the pool: int `[*stack, tasks]`.

    An expert counts for the first task that uses it.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.igsp.igsp(2, tasks=2)
      >>> tree = sj.adapt({"w": jnp.ones((3, 3))}, {"w": method}, key=jax.random.key(0))
      >>> kept_experts(tree)["w"].tolist()
      [2, 0]
    """
    found = {}
    for path, pool in pools(params).items():
        seen = np.cumsum(np.asarray(pool.active) > 0, axis=-2) > 0
        total = seen.sum(-1)
        found[path] = np.diff(total, axis=-1, prepend=0)
    return found


def stored_values(params: Params) -> dict[str, int]:
    r"""Returns how many numbers have to be kept: \(2 d r + r + d\) for an expert, \(d A\) for a router of A experts.

    Slots that no task uses, noise and masks do not count, prototypes are the selector's own.

    Returns:
      Counts of "experts" and "routers".

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.igsp.igsp(2, tasks=2)
      >>> stored_values(sj.adapt({"w": jnp.ones((3, 3))}, {"w": method}, key=jax.random.key(0)))
      {'experts': 34, 'routers': 6}
    """
    experts = routers = 0
    for pool in pools(params).values():
        active = np.asarray(pool.active) > 0
        inputs, size = pool.down.shape[-2:]
        experts += int(active.any(-2).sum()) * (inputs * size + size + size * pool.up.shape[-1] + pool.up.shape[-1])
        routers += int(active.sum()) * inputs
    return {"experts": experts, "routers": routers}


def compact(params: Params) -> Params:
    """Drops the slots of experts that no layer uses, for deployment.

    Outputs stay. Noise routers go: the tree is not to be trained further.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.igsp.igsp(2, tasks=4)
      >>> tree = sj.adapt({"w": jnp.ones((3, 3))}, {"w": method}, key=jax.random.key(0))
      >>> tree["w"].down.shape, compact(tree)["w"].down.shape
      ((8, 3, 2), (2, 3, 2))
    """
    pools(params)
    return map_pools(params, lambda path, pool: _compacted(pool))


def _compacted(pool: ExpertPool) -> ExpertPool:
    used = np.asarray(pool.active > 0).any(-2)
    order = jnp.asarray(np.argsort(~used, axis=-1, kind="stable")[..., : max(1, int(used.sum(-1).max()))])

    def first(value: jax.Array) -> jax.Array:
        return jnp.take_along_axis(value, order.reshape(*order.shape, *[1] * (value.ndim - order.ndim)), order.ndim - 1)

    def last(value: jax.Array) -> jax.Array:
        index = order.reshape(*order.shape[:-1], *[1] * (value.ndim - order.ndim), order.shape[-1])
        return jnp.take_along_axis(value, index, -1)

    return dataclasses.replace(
        pool,
        **{name: first(getattr(pool, name)) for name in ("down", "down_bias", "up", "up_bias", "candidates")},
        **{name: last(getattr(pool, name)) for name in ("router", "active")},
        noise_router=None,
        trainable=(),
    )
