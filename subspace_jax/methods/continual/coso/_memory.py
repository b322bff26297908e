"""Adds a finished task's leading directions to CoSO's history."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import OptState, StructureError, path_string, placed_like
from subspace_jax.linalg import orthonormalize, project, to_coordinates
from subspace_jax.methods.continual.coso._transform import CosoState


def next_task(state: OptState, energy_threshold: float = 0.98, *, min_new: int = 1) -> OptState:
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
      >>> optimizer = sj.scale_by_coso(r1=2, r2=2, side="in", tasks=1)
      >>> params = {"kernel": jnp.diag(jnp.array([2.0, 1.0, 0.0]))}
      >>> _, state = optimizer.update(params, optimizer.init(params))
      >>> next_task(state, energy_threshold=2.0).history["kernel"].tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    count = 0

    def one(node: Any) -> Any:
        nonlocal count
        if not isinstance(node, CosoState):
            return node
        count += 1
        sketches, treedef = jax.tree_util.tree_flatten_with_path(node.sketch)
        histories, used = jax.tree.leaves(node.history), jax.tree.leaves(node.used)
        ended = []
        for (path, sketch), history, live in zip(sketches, histories, used, strict=True):
            directions, counts = _new_directions(sketch, energy_threshold, min_new)
            _check_room(path_string(path), history, live, counts)
            ended.append(_joined(directions, counts, history, live))
        zeros = {name: jax.tree.map(jnp.zeros_like, getattr(node, name)) for name in CosoState._fields}
        history, used = (jax.tree.unflatten(treedef, [pair[i] for pair in ended]) for i in range(2))
        return CosoState(**zeros | {"history": history, "used": used})

    found = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, CosoState))
    if not count:
        raise StructureError("coso.next_task: the optimizer state holds no coso.")
    return found


def _new_directions(sketch: jax.Array, energy_threshold: float, min_new: int) -> tuple[jax.Array, jax.Array]:
    """The sketch's directions, `[*stack, m, r2]`, and how many of them count, `[*stack]`."""
    lengths = jnp.linalg.norm(sketch, axis=-2)
    live = lengths > 1e-6 * lengths[..., :1]  # shorter ones are rounding
    energy = jnp.square(lengths / jnp.where(lengths[..., :1] == 0, 1.0, lengths[..., :1]))
    share = jnp.cumsum(energy, axis=-1) / jnp.maximum(jnp.sum(energy, axis=-1, keepdims=True), 1.0)
    counts = jnp.sum(live & (share < energy_threshold), axis=-1)
    counts = jnp.minimum(jnp.maximum(counts, min_new), jnp.sum(live, axis=-1))
    directions = jnp.where(live[..., None, :], sketch / jnp.where(lengths == 0, 1.0, lengths)[..., None, :], 0.0)
    return directions, counts


def _joined(
    directions: jax.Array, counts: jax.Array, history: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The history with the first of the directions in it, and the number of its live columns."""
    # They are orthogonal to the history but for rounding, which many tasks would add up.
    directions = orthonormalize(project(directions, history, mode="remove"))
    rows, columns = jnp.arange(directions.shape[-1]), jnp.arange(history.shape[-1])
    taken = (columns == used[..., None, None] + rows[:, None]) & (rows[:, None] < counts[..., None, None])
    added = to_coordinates(directions, taken.astype(jnp.float32), side="out")
    live = jnp.minimum(used + counts, history.shape[-1]).astype(jnp.int32)
    return history + placed_like(added, history), live


def _check_room(path: str, history: jax.Array, used: jax.Array, counts: jax.Array) -> None:
    """Refuses more directions than the history has room for, where that is known."""
    if isinstance(used, Tracer):
        return
    size, room = history.shape[-2:]
    needed = np.asarray(used + counts)
    if (needed > room).any() and room < size:
        raise StructureError(
            f"{path}: the history would have {int(needed.max())} directions and has room for {room}. Make the "
            "optimizer with tasks= of at least the number of tasks."
        )
