"""Permutes heads or channels in all arrays that share them, so that a selection becomes contiguous."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, PatternError, RoleError, leaves_with_paths, map_with_paths, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupling:
    """The axes of several arrays that run over one layer's heads or channels.

    Reordering all of them alike changes no function: columns of the query, key and value kernels, their biases and
    the rows of the output kernel for heads; columns of gate and up, their biases and the rows of down for channels.

    Attributes:
      axes: by path, the axis that runs over the units. Its size is a multiple of `units`: a head of width 64 is 64
        neighbors that stay together. Whatever else is tied to a unit (a norm's scale, a per-channel quantization
        scale) belongs here too.
      units: number of heads or channels.
      grouped: by path, the axis that runs over groups of units: keys and values of grouped-query attention.
      groups: number of groups; `units` if None.
      stack: number of leading axes of every array that run over layers, each with an order of its own.
    """

    axes: Mapping[str, int]
    units: int
    grouped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    groups: int | None = None
    stack: int = 0

    def __post_init__(self) -> None:
        if self.groups is not None and self.units % self.groups:
            raise RoleError(f"{self.units} heads do not fall into {self.groups} groups of equal size.")


def coupled_order(
    first: np.ndarray | None, second: np.ndarray | None, *, units: int | None = None, groups: int | None = None
) -> np.ndarray:
    """Returns the order that makes two selections contiguous: only the first, both, only the second, the rest.

    The first selection is then the first two parts, the second the middle two. Under grouped-query attention a head
    may only move together with its group: groups are ordered so, and heads inside a group, selected ones first; heads
    selected one by one then need not become neighbors.

    Args:
      first: mask `(*stack, units)` of value heads or up channels, or `(*stack, groups)`; None for none.
      second: mask `(*stack, units)` of output heads or down channels; None for none.
      units: number of heads or channels, where it does not follow from `second`.
      groups: number of groups of heads; as many as units if None.

    Returns:
      `(*stack, units)`: which unit comes where.

    Raises:
      ValueError: there is no selection.
      RoleError: `first` does not run over the groups, or `second` not over the units.

    Example:
      >>> import numpy as np
      >>> v, o = np.array([True, False, False, True]), np.array([False, False, True, True])
      >>> coupled_order(v, o).tolist()
      [0, 3, 2, 1]
    """
    known = second if second is not None else first
    if known is None:
        raise ValueError("coupled_order: pass at least one selection.")
    stack, total = known.shape[:-1], units or known.shape[-1]
    per = groups or total
    heads = np.zeros((*stack, total), bool) if second is None else second
    early = np.zeros((*stack, per), bool) if first is None else first
    if early.shape[-1] != per or heads.shape[-1] != total:
        raise RoleError(
            f"coupled_order: selections of {early.shape[-1]} and {heads.shape[-1]} units; expected {per} of the "
            f"first (values exist once for each group) and {total} of the second."
        )
    size = total // per
    late = heads.reshape(*stack, per, size).any(-1)
    kind = np.where(early & ~late, 0, np.where(early, 1, np.where(late, 2, 3)))
    of_group = np.repeat(np.argsort(np.argsort(kind, axis=-1, kind="stable"), axis=-1), size, axis=-1)
    key = of_group * 2 + ~heads
    return np.argsort(key, axis=-1, kind="stable")


def inverse_order(order: np.ndarray) -> np.ndarray:
    """Returns the order that undoes another.

    Example:
      >>> import numpy as np
      >>> inverse_order(np.array([2, 0, 1])).tolist()
      [1, 2, 0]
    """
    return np.argsort(order, axis=-1)


def reordered(mask: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Applies an order of units to a mask of them.

    A mask of groups under an order of heads is reordered as the groups are.

    Example:
      >>> import numpy as np
      >>> reordered(np.array([False, False, True]), np.array([2, 0, 1])).tolist()
      [True, False, False]
    """
    return np.take_along_axis(mask, _of_groups(order, mask.shape[-1]), axis=-1)


def co_permute(params: Params, coupling: Coupling, order: np.ndarray) -> Params:
    """Permutes one layer's heads or channels in all arrays; the network computes the same function.

    Args:
      params: tree of arrays.
      coupling: through which axes they run.
      order: which unit comes where, `[*stack, units]`; `inverse_order(order)` undoes it bit for bit.

    Returns:
      A tree of the same structure; arrays that are not coupled are the same objects.

    Raises:
      PatternError: a path of the coupling is not in the tree.
      RoleError: an axis does not fit the units, or the order takes a head out of its group.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> params = {"up": jnp.arange(6.0).reshape(2, 3), "down": jnp.arange(3.0).reshape(3, 1)}
      >>> moved = co_permute(params, Coupling(axes={"up": 1, "down": 0}, units=3), np.array([2, 0, 1]))
      >>> moved["up"].tolist(), bool(jnp.allclose(moved["up"] @ moved["down"], params["up"] @ params["down"]))
      ([[2.0, 0.0, 1.0], [5.0, 3.0, 4.0]], True)
    """
    order = np.asarray(order)
    if order.ndim != coupling.stack + 1 or not np.array_equal(
        np.sort(order, axis=-1), np.broadcast_to(np.arange(coupling.units), order.shape)
    ):
        raise RoleError(
            f"co_permute: the order has shape {order.shape}; expected a permutation of {coupling.units} units for each "
            f"of the {coupling.stack} stacked axes' layers."
        )
    paths = [path for path, _ in leaves_with_paths(params)]
    for path in (*coupling.axes, *coupling.grouped):
        if path not in paths:
            raise PatternError(f"{path}: is in the coupling and not in the tree; nearest are {nearest(path, paths)}.")
    group_order = _of_groups(order, coupling.groups or coupling.units)

    def one(path: str, leaf: Any) -> Any:
        if path in coupling.axes:
            return _take(path, leaf, coupling.axes[path], order, coupling.stack)
        if path in coupling.grouped:
            return _take(path, leaf, coupling.grouped[path], group_order, coupling.stack)
        return leaf

    return map_with_paths(one, params)


def _of_groups(order: np.ndarray, groups: int) -> np.ndarray:
    """The order of the groups that an order of units moves."""
    units = order.shape[-1]
    size = units // groups
    sources = (order // size).reshape(*order.shape[:-1], groups, size)
    if not (sources == sources[..., :1]).all():
        raise RoleError(
            f"The order takes heads out of their groups ({units} heads in {groups} groups share keys and values). Move "
            "heads inside a group, or groups as a whole, as coupled_order(..., groups=) does."
        )
    return sources[..., 0]


def _take(path: str, leaf: Any, axis: int, order: np.ndarray, stack: int) -> Any:
    """One array with its units in order; the neighbors that make a unit stay together."""
    if not -leaf.ndim <= axis < leaf.ndim or axis % leaf.ndim < stack or leaf.shape[axis] % order.shape[-1]:
        raise RoleError(
            f"{path}: axis {axis} of shape {leaf.shape} does not run over {order.shape[-1]} units behind {stack} "
            "stacked axes."
        )
    axis %= leaf.ndim
    width = leaf.shape[axis] // order.shape[-1]
    entries = (order[..., None] * width + np.arange(width)).reshape(*order.shape[:-1], -1)
    # Arrays of numpy stay with numpy: a checkpoint is permuted where it was loaded.
    numpy: Any = np if isinstance(leaf, np.ndarray) else jnp
    if not stack:
        return numpy.take(leaf, entries, axis=axis)
    shape = [1] * leaf.ndim
    shape[:stack], shape[axis] = entries.shape[:-1], entries.shape[-1]
    return numpy.take_along_axis(leaf, numpy.asarray(entries.reshape(shape)), axis=axis)
