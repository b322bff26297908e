"""Maps arrays to the coordinates of subspaces and back, and moments from one subspace to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import OptState, PyTree, Role, placed_like
from subspace_jax.linalg import Side, from_coordinates, randomized_svd, to_coordinates, transport, truncated_svd
from subspace_jax.optim._holes import Leaves, is_hole
from subspace_jax.optim._matrix_views import MatrixView, matrix_views
from subspace_jax.optim._moments import FIRST_MOMENTS, SECOND_MOMENTS, map_moments
from subspace_jax.optim._rounding import without_rounding

SideRule = Literal["shorter", "longer", "in", "out"]
Moments = Literal["carry", "reset", "transport"]


@dataclasses.dataclass(frozen=True)
class SubspaceMap:
    """Maps one array to the coordinates of a subspace of one of its sides, and back.

    Attributes:
      view: how the array is seen as matrices.
      side: which of their sides the subspace lies in.
    """

    view: MatrixView
    side: Side

    def coordinates(self, array: jax.Array, basis: jax.Array, *, drop_rounding: bool = False) -> jax.Array:
        """Returns the coordinates of an array in the subspace, in the array's dtype.

        Args:
          array: of the view's shape.
          basis: `[*stack, d, k]`, orthonormal columns.
          drop_rounding: whether coordinates that are rounding alone become zero.

        Returns:
          `[*stack, k, out]` for side "in", `[*stack, in, k]` for "out".
        """
        matrix = self.view.unfold(array)
        found = to_coordinates(matrix, basis, side=self.side)
        return (without_rounding(found, matrix) if drop_rounding else found).astype(array.dtype)

    def lifted(self, coordinates: jax.Array, basis: jax.Array, scale: Any, like: jax.Array) -> jax.Array:
        """Returns the array that coordinates stand for, times a scale.

        Args:
          coordinates: `[*stack, k, out]` for side "in", `[*stack, in, k]` for "out".
          basis: `[*stack, d, k]`, orthonormal columns.
          scale: a number or scalar array.
          like: an array of the view's shape, whose dtype and layout the result has.
        """
        whole = scale * from_coordinates(coordinates, basis, side=self.side)
        return placed_like(self.view.fold(whole).astype(like.dtype), like)

    def leading(self, gradient: jax.Array, old: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the leading singular vectors of a gradient, placed as the basis was."""
        matrix, rank = self.on_side(self.view.unfold(gradient)), old.shape[-1]
        found = truncated_svd(matrix, rank) if key is None else randomized_svd(key, matrix, rank)
        return placed_like(found.u.astype(old.dtype), old)

    def on_side(self, matrix: jax.Array) -> jax.Array:
        """The matrix, transposed if need be, so that the subspace's own side comes first.

        Decompositions fix the signs of left singular vectors. Those of right ones would depend on left vectors that are
        not kept, and moments would be carried over flips.
        """
        return matrix if self.side == "in" else jnp.swapaxes(matrix, -1, -2)

    def empty(self, array: jax.Array, size: int, *, basis: bool) -> jax.Array:
        """Zeros for a basis in float32, or for coordinates in the array's dtype, split over devices as the array is."""
        matrix = self.view.unfold(array)
        axis = -1 if basis == (self.side == "in") else -2
        # A sum over one axis leaves the other one split as it was.
        line = jnp.zeros_like(jnp.sum(matrix, axis=axis, keepdims=True), dtype=jnp.float32 if basis else array.dtype)
        zeros = jnp.broadcast_to(
            line, (*line.shape[:-1], size) if axis == -1 else (*line.shape[:-2], size, line.shape[-1])
        )
        return jnp.swapaxes(zeros, -1, -2) if basis and self.side == "out" else zeros


def matrix_shape(array: jax.Array, view: MatrixView) -> tuple[int, ...]:
    """Returns the shape `[*stack, in, out]` of an array as matrices.

    Args:
      array: of the view's shape; it may be abstract.
      view: how it is seen as matrices.
    """
    return jax.eval_shape(view.unfold, array).shape


def subspace_map(view: MatrixView | None, array: jax.Array, rule: SideRule) -> SubspaceMap | None:
    """Returns the map of the side that a rule chooses; None if the leaf is not read as a matrix with such a side.

    Args:
      view: how the leaf is seen as matrices; None where it is not.
      array: the leaf; it may be abstract.
      rule: "in" or "out" for this side of every matrix, or the "shorter" or "longer" one of each.
    """
    if view is None or view.is_vector:
        return None
    if rule in ("in", "out"):
        return SubspaceMap(view, rule) if rule in view.sides else None  # pyright: ignore[reportArgumentType]
    inputs, outputs = matrix_shape(array, view)[-2:]
    return SubspaceMap(view, "in" if inputs == outputs or (inputs < outputs) == (rule == "shorter") else "out")


def places_of(
    tree: PyTree, bases: list[Any], rule: SideRule, roles: Mapping[str, Role] | None
) -> list[SubspaceMap | None]:
    """Returns the map of each array that has a basis; None for the others."""
    found = zip(matrix_views(tree, roles), jax.tree.leaves(tree), bases, strict=True)
    return [None if is_hole(b) else subspace_map(view, leaf, rule) for view, leaf, b in found]


@dataclasses.dataclass(frozen=True)
class Move:
    """The change of basis of one array."""

    side: Side
    old: jax.Array
    new: jax.Array

    def fits(self, value: Any) -> bool:
        axis = -2 if self.side == "in" else -1
        return getattr(value, "ndim", 0) >= 2 and value.shape[axis] == self.old.shape[-1]

    def apply(self, value: jax.Array, squares: bool) -> jax.Array:
        moved = transport(value, self.old, self.new, side=self.side, squares=squares)
        return placed_like(moved.astype(value.dtype), value)


def moved_moments(state: OptState, moves: list[Move | None], held: Leaves, moments: Moments) -> OptState:
    """Returns the inner optimizer's state in the new coordinates."""
    if moments == "carry":
        return state

    def mapped(tree: PyTree, squares: bool) -> PyTree:
        try:
            values = held.of(tree)
        except ValueError:  # a moment that is not like the parameters, of a factored optimizer for instance
            return tree

        def one(value: Any, move: Move | None) -> Any:
            if move is None or not move.fits(value):
                return value
            return jnp.zeros_like(value) if moments == "reset" else move.apply(value, squares)

        return held.kept([one(v, m) for v, m in zip(values, moves, strict=True)], tree)

    functions = {
        **dict.fromkeys(FIRST_MOMENTS, lambda tree: mapped(tree, False)),
        **dict.fromkeys(SECOND_MOMENTS, lambda tree: mapped(tree, True)),
    }
    return map_moments(state, functions)
