"""Holes: places of a tree where another tree has an array and this one has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from subspace_jax.core import OptState, Params, PyTree, Updates


def is_hole(value: Any) -> bool:
    """Tells whether a value holds no array: None, `optax.MaskedNode`, or an empty container.

    Example:
      >>> import optax
      >>> [is_hole(v) for v in (None, optax.MaskedNode(), 1.0)]
      [True, True, False]
    """
    return not jax.tree.leaves(value)


def like_updates(updates: Updates, tree: PyTree) -> PyTree:
    """Returns a tree like the parameters with None wherever the updates have None, since those do not train.

    Args:
      updates: gradients, None where there is none.
      tree: parameters, or a state with one value for each of them.

    Example:
      >>> like_updates({"a": 1.0, "b": None}, {"a": 2.0, "b": 3.0})
      {'a': 2.0, 'b': None}
    """
    return jax.tree.map(lambda u, v: None if u is None else v, updates, tree, is_leaf=_is_none)


def filled(new: PyTree, old: PyTree) -> PyTree:
    """Returns a new state with the old one's values wherever the new one has None, so that its structure stays.

    Example:
      >>> filled({"a": 1.0, "b": None}, {"a": 2.0, "b": 3.0})
      {'a': 1.0, 'b': 3.0}
    """
    return jax.tree.map(lambda n, o: o if n is None else n, new, old, is_leaf=_is_none)


def rest_without_gradient(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that arrays whose gradient is None keep their value and their state.

    Optimizers of optax take None for a gradient in part only: Adam refuses it, momentum is lost.

    Args:
      inner: any optimizer; it sees None among the updates, the parameters and its state alike.

    Returns:
      A transformation with the state of `inner`, whose structure stays. Its `update` needs `params` to tell what has no
      gradient.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> optimizer = sj.optim.rest_without_gradient(optax.adam(0.1))
      >>> updates, _ = optimizer.update({"a": jnp.ones(2), "b": None}, optimizer.init(params), params)
      >>> updates["b"] is None
      True
    """
    extended = optax.with_extra_args_support(inner)

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, OptState]:
        return update_resting(extended, updates, state, params, params, **extra)

    return optax.GradientTransformationExtraArgs(extended.init, update)


def update_resting(
    inner: optax.GradientTransformationExtraArgs,
    updates: Updates,
    state: OptState,
    like: PyTree,
    params: Params,
    **extra: Any,
) -> tuple[Updates, OptState]:
    """Updates by an optimizer, which rests where the updates have None and a tree `like` the parameters has arrays."""
    if like is None or jax.tree.structure(updates) == jax.tree.structure(like):
        return inner.update(updates, state, params, **extra)

    def inside(update: Any, value: Any) -> Any:
        """None may stand for a whole weight; here it stands for each of its arrays."""
        return jax.tree.map(lambda _: None, value) if update is None else update

    given = jax.tree.map(inside, updates, like, is_leaf=_is_none)
    flags = jax.tree.map(lambda u, v: None if v is None else u is not None, given, like, is_leaf=_is_none)

    def hidden(value: Any, has_gradient: bool) -> Any:
        return value if is_hole(value) or has_gradient else None

    # An optimizer's own holes have no array to hide.
    seen = optax.tree.map_params(inner, hidden, state, flags, is_leaf=lambda v: isinstance(v, optax.MaskedNode))
    resting = None if params is None else like_updates(given, params)
    found, new = inner.update(given, seen, resting, **extra)
    return like_updates(updates, found), filled(new, state)


def _is_none(value: Any) -> bool:
    return value is None


class Leaves:
    """Lists of the arrays of updates, and of trees like them, in one order, without the places that have no gradient.

    Attributes:
      arrays: `jax.tree.leaves` of the updates.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self.arrays, self.treedef = jax.tree.flatten(updates)

    def of(self, tree: PyTree) -> list[Any]:
        """Returns what a tree like the parameters has in the places of the arrays."""
        return self.treedef.flatten_up_to(like_updates(self._updates, tree))

    def tree(self, values: Sequence[Any]) -> PyTree:
        """Returns a tree like the updates."""
        return jax.tree.unflatten(self.treedef, values)

    def kept(self, values: Sequence[Any], old: PyTree) -> PyTree:
        """Returns a tree like `old`, which stays as it is where the updates have no array."""
        return filled(self.tree(values), old)
