"""Adds a finished task's leading directions to CoSO's history."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import StructureError, placed_like
from subspace_jax.linalg import orthonormalize, project, to_coordinates
from subspace_jax.methods.continual.coso._transform import CosoState, CosoSubspace


def next_task(state: Any, energy_threshold: float = 0.98, *, min_new: int = 1) -> Any:
    r"""Adds a task's leading gradient directions to the history in the optimizer's state; all else starts again.

    Of the sketch's singular values \(\sigma\) the first \(k\) count, as many as have a cumulative share of
    \(\sum \sigma^2\) strictly below `energy_threshold`: the direction that crosses it stays unprotected.

    Args:
      state: of a chain, `multi_transform`, `MultiSteps` or the like, with `coso` in it.
      energy_threshold: share of the energy. Above 1 every direction with a value counts.
      min_new: least number of new directions of a sketch that is not zero. The official rule is 0: then a task with one
        dominant direction protects nothing.

    Returns:
      A state of the same shapes. Nothing compiles again, and this may be compiled too.

    Raises:
      StructureError: there is no `coso` in the state, or the history has no room (where its values are known; where
        they are not, the directions that do not fit are dropped).

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.coso(1e-2, r1=2, r2=2, side="input", tasks=1)
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 1.0, 0.0]))}
      >>> _, state = optimizer.update(params, optimizer.init(params))
      >>> next_task(state, energy_threshold=2.0).subspaces["kernel"].history.tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    count = 0

    def is_subspace(value: Any) -> bool:
        return isinstance(value, CosoSubspace)

    def one(node: Any) -> Any:
        nonlocal count
        if not isinstance(node, CosoState):
            return node
        count += 1
        pairs = jax.tree_util.tree_leaves_with_path(node.subspaces, is_leaf=is_subspace)
        for path, subspace in pairs:
            _check_room(jax.tree_util.keystr(path, simple=True, separator="/"), subspace, energy_threshold, min_new)
        end_state = jax.tree.map(lambda s: _ended(s, energy_threshold, min_new), node.subspaces, is_leaf=is_subspace)
        zeros = [jax.tree.map(jnp.zeros_like, tree) for tree in (node.count, node.mu, node.nu)]
        return CosoState(zeros[0], end_state, *zeros[1:])

    found = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, CosoState))
    if not count:
        raise StructureError("coso.next_task: the optimizer state holds no coso.")
    return found


def _new_directions(subspace: CosoSubspace, energy_threshold: float, min_new: int) -> tuple[jax.Array, jax.Array]:
    """The sketch's directions, `[*stack, m, r2]`, and how many of them count, `[*stack]`."""
    lengths = jnp.linalg.norm(subspace.sketch, axis=-2)
    live = lengths > 1e-6 * lengths[..., :1]  # shorter ones are rounding
    energy = jnp.square(lengths / jnp.where(lengths[..., :1] == 0, 1.0, lengths[..., :1]))
    share = jnp.cumsum(energy, axis=-1) / jnp.maximum(jnp.sum(energy, axis=-1, keepdims=True), 1.0)
    counts = jnp.sum(live & (share < energy_threshold), axis=-1)
    counts = jnp.minimum(jnp.maximum(counts, min_new), jnp.sum(live, axis=-1))
    directions = jnp.where(
        live[..., None, :], subspace.sketch / jnp.where(lengths == 0, 1.0, lengths)[..., None, :], 0.0
    )
    return directions, counts


def _ended(subspace: CosoSubspace, energy_threshold: float, min_new: int) -> CosoSubspace:
    if not isinstance(subspace, CosoSubspace):
        return subspace
    directions, counts = _new_directions(subspace, energy_threshold, min_new)
    # They are orthogonal to the history but for rounding, which many tasks would add up.
    directions = orthonormalize(project(directions, subspace.history, mode="remove"))
    used, history = subspace.used, subspace.history
    rows, columns = jnp.arange(directions.shape[-1]), jnp.arange(history.shape[-1])
    taken = (columns == used[..., None, None] + rows[:, None]) & (rows[:, None] < counts[..., None, None])
    added = to_coordinates(directions, taken.astype(jnp.float32), side="out")
    history = history + placed_like(added, history)
    zeros = (jnp.zeros_like(subspace.basis), jnp.zeros_like(subspace.sketch))
    return CosoSubspace(*zeros, history, jnp.minimum(used + counts, history.shape[-1]).astype(jnp.int32))


def _check_room(path: str, subspace: Any, energy_threshold: float, min_new: int) -> None:
    """Refuses more directions than the history has room for, where that is known."""
    if not isinstance(subspace, CosoSubspace) or isinstance(subspace.used, Tracer):
        return
    room = subspace.history.shape[-1]
    needed = np.asarray(subspace.used + _new_directions(subspace, energy_threshold, min_new)[1])
    if (needed > room).any() and room < subspace.history.shape[-2]:
        raise StructureError(
            f"{path}: the history would have {int(needed.max())} directions and has room for {room}. Make the "
            "optimizer with tasks= of at least the number of tasks."
        )
