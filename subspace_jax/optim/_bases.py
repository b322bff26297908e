"""Bases that gradient transformations are given by path, and what must hold of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import PyTree, Role, StructureError, leaves_with_paths, path_string
from subspace_jax.optim._matrix_views import MatrixView, check_paths, matrix_views, refuse_unseen

Side = Literal["in", "out", "both"]


def bases_by_path(basis: Any, side: Side) -> dict[str, Any]:
    """Returns bases by path, pairs of them for both sides, of a dict by path or of a tree with holes."""
    if side != "both":
        return dict(leaves_with_paths(basis))
    pairs = jax.tree_util.tree_leaves_with_path(basis, is_leaf=lambda v: isinstance(v, tuple))
    return {path_string(path): value for path, value in pairs}


def of_sides(basis: Any, side: Side) -> dict[str, Any]:
    """Returns the bases, or removers, of one leaf by side."""
    return {"in": basis[0], "out": basis[1]} if side == "both" else {side: basis}


def check_bases(
    bases: Mapping[str, Any],
    tree: PyTree,
    side: Side,
    roles: Mapping[str, Role] | None,
    *,
    gradients: bool = False,
) -> list[MatrixView | None]:
    """Refuses bases that do not fit the matrices of a tree; looks at shapes only.

    Args:
      bases: by path.
      tree: parameters or updates.
      side: which axes the bases lie in.
      roles: how the model uses plain arrays, by path or glob; two axes are (in, out) without it.
      gradients: the tree may have None where there is no gradient.

    Returns:
      The tree's `matrix_views`.

    Raises:
      PatternError: a basis is for no leaf.
      RoleError: an array with a basis is not known to be a matrix.
      StructureError: a basis does not fit its array, or is in a narrower dtype than float32.
    """
    check_paths(bases, tree, "basis", gradients=gradients)
    seen = matrix_views(tree, roles)
    refuse_unseen(tree, seen, bases)
    for leaf, view in zip(jax.tree.leaves(tree), seen, strict=True):
        if view is not None and view.path in bases:
            _check(jax.eval_shape(view.unfold, leaf).shape, view, of_sides(bases[view.path], side))
    return seen


def _check(shape: tuple[int, ...], view: MatrixView, bases: Mapping[str, jax.Array]) -> None:
    for side, columns in bases.items():
        if side not in view.sides:
            continue
        stack, size = shape[:-2], shape[-2 if side == "in" else -1]
        expected = f"[{', '.join(map(str, (*stack, size, 'k')))}] in float32"
        if columns.dtype not in (jnp.float32, jnp.float64):
            raise StructureError(f"{view.path}: the basis is in {columns.dtype}; expected {expected}.")
        if columns.ndim < 2 or columns.shape[-2] != size or columns.shape[:-2] not in ((), stack):
            raise StructureError(
                f"{view.path}: the basis of side {side!r} has shape {columns.shape}; expected {expected} for matrices "
                f"{shape}. Is it of the other side?"
            )
        if columns.shape[-1] > size:
            raise StructureError(
                f"{view.path}: {columns.shape[-1]} columns in {size} dimensions cannot be orthonormal; expected at "
                f"most {size}."
            )


def check_orthonormal(bases: Mapping[str, Any], side: Side) -> None:
    """Refuses columns that are neither orthonormal nor zero, where their values are known.

    Raises:
      StructureError: columns are not.
    """
    for path, basis in bases.items():
        for columns in of_sides(basis, side).values():
            if isinstance(columns, Tracer) or not getattr(columns, "is_fully_addressable", True):
                continue
            known = np.asarray(columns)  # not of JAX: `init` may be traced, the basis is not
            gram = np.swapaxes(known, -1, -2) @ known
            live = np.diagonal(gram, axis1=-2, axis2=-1) > 0.5
            error = float(np.max(np.abs(gram - np.eye(gram.shape[-1]) * live[..., None, :]), initial=0.0))
            if not error < 1e-3:
                raise StructureError(
                    f"{path}: the basis is off orthonormal columns by {error:.2g}; expected columns of length one, or "
                    "zero, orthogonal to each other. subspace_jax.linalg.orthonormalize makes them."
                )
