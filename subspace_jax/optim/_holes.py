"""Holes: places of a tree where another tree has an array and this one has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def is_hole(value: Any) -> bool:
    """Tells whether there is no array in the place of one: None, what optax masks with, or what Flax makes of that.

    Example:
      >>> import optax
      >>> [is_hole(v) for v in (None, optax.MaskedNode(), 1.0)]
      [True, True, False]
    """
    return not jax.tree.leaves(value)


def like_updates(updates: Any, tree: Any) -> Any:
    """Returns a tree like the parameters with None wherever the updates have None, since those do not train.

    Args:
      updates: gradients, None where there is none.
      tree: parameters, or a state with one value for each of them.

    Example:
      >>> like_updates({"a": 1.0, "b": None}, {"a": 2.0, "b": 3.0})
      {'a': 2.0, 'b': None}
    """
    return jax.tree.map(lambda u, v: None if u is None else v, updates, tree, is_leaf=_is_none)


def filled(new: Any, old: Any) -> Any:
    """Returns a new state with the old one's values wherever the new one has None, so that its structure stays.

    Example:
      >>> filled({"a": 1.0, "b": None}, {"a": 2.0, "b": 3.0})
      {'a': 1.0, 'b': 3.0}
    """
    return jax.tree.map(lambda n, o: o if n is None else n, new, old, is_leaf=_is_none)


def _is_none(value: Any) -> bool:
    return value is None


class Leaves:
    """The arrays of updates in a list, and lists in the same order of trees that have one value for each of them.

    Attributes:
      arrays: `jax.tree.leaves` of the updates.
    """

    def __init__(self, updates: Any) -> None:
        self._updates = updates
        self.arrays, self.treedef = jax.tree.flatten(updates)

    def of(self, tree: Any) -> list[Any]:
        """Returns what a tree like the parameters has in the places of the arrays."""
        return self.treedef.flatten_up_to(like_updates(self._updates, tree))

    def tree(self, values: Sequence[Any]) -> Any:
        """Returns a tree like the updates."""
        return jax.tree.unflatten(self.treedef, values)

    def kept(self, values: Sequence[Any], old: Any) -> Any:
        """Returns a tree like `old`, which stays as it is where the updates have no array."""
        return filled(self.tree(values), old)
