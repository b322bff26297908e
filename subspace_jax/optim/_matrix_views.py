"""How a gradient transformation sees the arrays of a tree: as stacks of matrices from inputs to outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import (
    PatternError,
    PyTree,
    Role,
    RoleError,
    Updates,
    Weight,
    is_weight,
    leaves_with_paths,
    matches,
    nearest,
    path_string,
    placed_like,
)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One array of a tree, seen as `[*stack, in, out]`.

    Attributes:
      path: of the leaf; all fields of a stand-in weight have its path.
      sides: which of "in" and "out" are sides of the model's own kernel; the other one is a rank.
      shape: of the array.
      role: folds the matrices back to the array; None where the array is one already.
      is_vector: the array has output axes only, and its matrices one row.
    """

    path: str
    sides: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role | None = None
    is_vector: bool = False

    def unfold(self, array: jax.Array) -> jax.Array:
        """Returns the array as `[*stack, in, out]`."""
        if self.is_vector:
            return array[..., None, :]
        return array if self.role is None else self.role.matrix(array)

    def fold(self, matrix: jax.Array) -> jax.Array:
        """Returns the array of matrices; the inverse of `unfold`."""
        if self.is_vector:
            return matrix[..., 0, :]
        return matrix if self.role is None else self.role.unmatrix(matrix, self.shape)


def matrix_views(tree: PyTree, roles: Mapping[str, Role] | None = None) -> list[MatrixView | None]:
    """Returns how to see each of `jax.tree.leaves(tree)`; None if the leaf cannot be read as a matrix with entries.

    Args:
      tree: gradients, updates or parameters, with stand-in weights or without.
      roles: how the model uses plain arrays, by path or glob; two axes are (in, out) without it.
    """
    found: list[MatrixView | None] = []
    for path, leaf in leaves_with_paths(tree):
        if is_weight(leaf):
            found.extend(_of_weight(path, leaf))
        else:
            found.append(_of_array(path, leaf, roles))
    return found


def _of_weight(path: str, weight: Weight) -> list[MatrixView | None]:
    found: list[MatrixView | None] = []
    for name, value in weight.data_items():
        if isinstance(value, Weight):
            found.extend(_of_weight(path, value))
            continue
        words = weight.axes[name].split()
        for leaf in jax.tree.leaves(value):
            if not getattr(leaf, "size", 1):
                seen = None
            elif words == ["array"]:
                seen = MatrixView(path, ("in", "out"), leaf.shape, weight.role) if weight.role.is_matrix else None
            elif words[-2:] == ["in", "rank"]:
                seen = MatrixView(path, ("in",), leaf.shape)
            elif words[-2:] == ["rank", "out"]:
                seen = MatrixView(path, ("out",), leaf.shape)
            elif words == ["stack", "out"]:
                seen = MatrixView(path, ("out",), leaf.shape, is_vector=True)
            else:
                seen = None
            found.append(seen)
    return found


def _of_array(path: str, leaf: Any, roles: Mapping[str, Role] | None) -> MatrixView | None:
    if not getattr(leaf, "size", 1):
        return None
    ndim = getattr(leaf, "ndim", 0)
    role = next((r for pattern, r in (roles or {}).items() if pattern == path or matches(pattern, path)), None)
    if role is None:
        return MatrixView(path, ("in", "out"), leaf.shape) if ndim == 2 else None
    return MatrixView(path, ("in", "out"), leaf.shape, role) if role.is_matrix else None


def check_paths(given: Mapping[str, Any], tree: PyTree, what: str, *, gradients: bool = False) -> None:
    """Raises PatternError where a path is neither a leaf of a tree nor masked there.

    Args:
      given: what was given by path.
      tree: what an optimizer is initialized with, or its updates; `optax.MaskedNode` where another one serves.
      what: what to call the given things.
      gradients: None in the tree, which of a gradient means that there is none, is masked too.
    """

    def is_masked(value: Any) -> bool:
        return isinstance(value, optax.MaskedNode) or (gradients and value is None)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda v: is_weight(v) or is_masked(v))
    known = {path_string(path): is_masked(leaf) for path, leaf in leaves}
    if not known:  # optax stands a placeholder without leaves for the parameters, to tell what of a state is like them
        return
    masked = [f"{path}/" for path, hidden in known.items() if hidden]
    for path in given:
        # What is masked may be a whole layer.
        if path not in known and not any(path.startswith(prefix) for prefix in masked):
            raise PatternError(
                f"{path}: there is a {what} for it and no such leaf in the tree; nearest are "
                f"{nearest(path, list(known))}. Give the paths of the tree that the optimizer trains."
            )


def map_matrices(
    function: Callable[[jax.Array, MatrixView], jax.Array],
    updates: Updates,
    roles: Mapping[str, Role] | None = None,
    paths: Any = None,
    *,
    seen: Sequence[MatrixView | None] | None = None,
) -> Updates:
    """Maps `function(matrix, view)` over the arrays that are matrices; it returns one of the same shape.

    Args:
      function: gets `[*stack, in, out]`; its result gets the array's dtype and layout.
      updates: a tree.
      roles: how the model uses plain arrays, by path or glob; two axes are (in, out) without it.
      paths: a container of the paths to map; all of them if None.
      seen: the tree's `matrix_views`, where they are known and checked already.

    Raises:
      RoleError: a wanted array is not known to be a matrix.
    """
    leaves, treedef = jax.tree.flatten(updates)
    if seen is None:
        seen = matrix_views(updates, roles)
        if paths is not None:
            refuse_unseen(updates, seen, paths)
    mapped = [
        leaf
        if view is None or (paths is not None and view.path not in paths)
        else placed_like(view.fold(function(view.unfold(leaf), view)).astype(leaf.dtype), leaf)
        for leaf, view in zip(leaves, seen, strict=True)
    ]
    return jax.tree.unflatten(treedef, mapped)


def refuse_unseen(updates: Updates, seen: Sequence[MatrixView | None], paths: Any) -> None:
    """Raises RoleError where a leaf of `paths` has no array that is seen as a matrix."""
    visible = {view.path for view in seen if view is not None}
    for path, leaf in leaves_with_paths(updates):
        if path in paths and path not in visible and any(getattr(v, "size", 1) for v in jax.tree.leaves(leaf)):
            raise RoleError(
                f"{path}: shape {jnp.shape(leaf) if not is_weight(leaf) else leaf.shape} is not known to be a matrix "
                "from inputs to outputs. Pass roles=sj.roles(fn, params, *example_inputs), or leave this path out."
            )
