"""Projections onto subspaces, and coordinates in them.

A basis is `[*stack, d, k]` with orthonormal columns, or zero columns beyond its rank: those change nothing, so a basis
can grow inside an array of one shape. Nothing here forms a `d x d` projector.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from subspace_jax.linalg._sharding import whole_matrices, without_repeats

Side = Literal["in", "out"]
Mode = Literal["remove", "keep"]


@functools.partial(jax.jit, static_argnames=("mode", "side"), inline=True)
def project(
    matrix: Float[Array, "*stack in out"], basis: Float[Array, "*stack d k"], *, mode: Mode = "keep", side: Side = "in"
) -> Float[Array, "*stack in out"]:
    r"""Projects the columns (side "in") or rows (side "out") of a matrix onto a subspace, or onto its complement.

    \(U U^T G\) or \(G - U U^T G\) for "in"; \(G U U^T\) or \(G - G U U^T\) for "out".

    Args:
      matrix: `[*stack, in, out]`.
      basis: \(U\), `[*stack, d, k]`, where `d` is the size of that side.
      mode: "keep" what is in the subspace, or "remove" it.
      side: which axis the subspace lies in.

    Returns:
      A matrix like the given one, in float32 (float64 if it is that).

    Example:
      >>> import jax.numpy as jnp
      >>> project(jnp.ones((2, 3)), jnp.array([[1.0], [0.0]]), mode="remove").tolist()
      [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    kept = from_coordinates(to_coordinates(matrix, basis, side=side), basis, side=side)
    return kept if mode == "keep" else matrix.astype(kept.dtype) - kept


def to_coordinates(
    matrix: Float[Array, "*stack in out"], basis: Float[Array, "*stack d k"], *, side: Side = "in"
) -> Float[Array, "*stack _ _"]:
    r"""Returns coordinates of a matrix in a subspace: \(U^T G\), `[*stack, k, out]`, or \(G U\), `[*stack, in, k]`.

    The result is in at least float32.

    Args:
      matrix: \(G\), `[*stack, in, out]`.
      basis: \(U\), `[*stack, d, k]`.
      side: which axis the subspace lies in.
    """
    if side == "in":
        return wide_matmul(jnp.swapaxes(basis, -1, -2), matrix, split=(None, -1))
    return wide_matmul(matrix, basis, split=(-2, None))


def from_coordinates(
    coordinates: Float[Array, "*stack _ _"], basis: Float[Array, "*stack d k"], *, side: Side = "in"
) -> Float[Array, "*stack in out"]:
    r"""Returns the matrix of given coordinates in a subspace: \(U C\) or \(C U^T\).

    Args:
      coordinates: \(C\), `[*stack, k, out]` or `[*stack, in, k]`.
      basis: \(U\), `[*stack, d, k]`.
      side: which axis the subspace lies in.
    """
    if side == "in":
        return wide_matmul(basis, coordinates, split=(-2, -1))
    return wide_matmul(coordinates, jnp.swapaxes(basis, -1, -2), split=(-2, -1))


def transport(
    coordinates: Float[Array, "*stack _ _"],
    old: Float[Array, "*stack d _"],
    new: Float[Array, "*stack d _"],
    *,
    side: Side = "in",
    squares: bool = False,
) -> Float[Array, "*stack _ _"]:
    r"""Transports coordinates to another basis: \(R C\) or \(C R^T\) with \(R = U_{new}^T U_{old}\).

    Args:
      coordinates: \(C\), in the old basis.
      old: `[*stack, d, k]`.
      new: `[*stack, d, k]`.
      side: which axis the subspaces lie in.
      squares: the coordinates are means of squares, which mix by \(R \circ R\): exact where the coordinates that
        were squared are uncorrelated with mean zero.

    Returns:
      Coordinates in the new basis, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> transport(jnp.array([[2.0]]), jnp.eye(2)[:, :1], -jnp.eye(2)[:, :1]).tolist()
      [[-2.0]]
    """
    mixing = to_coordinates(old, new)
    mixing = jnp.square(mixing) if squares else mixing
    if side == "in":
        return wide_matmul(mixing, coordinates, split=(None, -1))
    return wide_matmul(coordinates, jnp.swapaxes(mixing, -1, -2), split=(-2, None))


@functools.partial(jax.jit, static_argnames="split", inline=True)
def wide_matmul(
    left: Float[Array, "*#stack m k"],
    right: Float[Array, "*#stack k n"],
    *,
    split: tuple[int | None, int | None] = (-2, -1),
) -> Float[Array, "*stack m n"]:
    """Returns a product of stacked matrices in at least float32, also over axes that are split between devices.

    Args:
      left: `[*stack, m, k]`.
      right: `[*stack, k, n]`.
      split: the axis of each operand whose split over explicit mesh axes the result inherits; None replicates it.
    """
    wide = jnp.promote_types(jnp.promote_types(left.dtype, right.dtype), jnp.float32)
    left, right = left.astype(wide), right.astype(wide)
    if any(jax.typeof(v).sharding.mesh.explicit_axes for v in (left, right)):
        return _placed_matmul(left, right, split)
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _placed_matmul(
    left: Float[Array, "*#stack m k"], right: Float[Array, "*#stack k n"], split: tuple[int | None, int | None]
) -> Float[Array, "*stack m n"]:
    """A product over explicit mesh axes.

    Not by `jnp.matmul`: it takes the result's sharding for axes in an order that broadcast or unit axes of the stack
    change. Here both operands get the whole stack first.
    """
    entries = [(*s.spec, *(None,) * (v.ndim - len(s.spec))) for v in (left, right) for s in [jax.typeof(v).sharding]]
    depth = max(left.ndim, right.ndim) - 2
    padded = [(*(None,) * (depth + 2 - len(e)), *e[:-2]) for e in entries]  # one matrix may serve a whole stack
    stack = [a if a is not None else b for a, b in zip(*padded, strict=True)]
    shape = jnp.broadcast_shapes(left.shape[:-2], right.shape[:-2])

    def stacked(array: Float[Array, "... a b"], own: tuple[Any, ...]) -> Float[Array, "... a b"]:
        if array.shape[:-2] == shape and list(own[:-2]) == stack:
            return array
        spec = without_repeats([*stack, *own[-2:]])
        return jnp.broadcast_to(array, (*shape, *array.shape[-2:]), out_sharding=PartitionSpec(*spec))

    left, right = stacked(left, entries[0]), stacked(right, entries[1])
    row = entries[0][-2] if split[0] is not None else None
    column = entries[1][-1] if split[1] is not None else None
    batch = tuple(range(depth))
    return lax.dot_general(
        left,
        right,
        (((depth + 1,), (depth,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        out_sharding=PartitionSpec(*without_repeats([*stack, row, column])),
    )


def complete(basis: Float[Array, "*stack d k"]) -> Float[Array, "*stack d _"]:
    """Returns an orthonormal basis of the complement of the span of `basis`.

    Args:
      basis: `[*stack, d, k]`, concrete; zero columns do not count.

    Returns:
      `[*stack, d, d - rank]` in float32; of a stack with unequal ranks the smallest counts, padded with zero columns.

    Example:
      >>> import jax.numpy as jnp
      >>> complete(jnp.eye(3)[:, :1]).shape
      (3, 2)
    """
    u, s, _ = np.linalg.svd(np.asarray(basis, np.float64), full_matrices=True)
    ranks = (s > 0.5).sum(-1)
    first = int(ranks.min(initial=basis.shape[-2]))
    free = np.arange(first, basis.shape[-2]) >= ranks[..., None, None]
    return jnp.asarray(np.where(free, u[..., first:], 0.0), jnp.float32)


def orthonormalize(columns: Float[Array, "*stack d k"], tolerance: float = 1e-6) -> Float[Array, "*stack d k"]:
    """Orthonormalizes columns from left to right; columns that depend on earlier ones become zero.

    Args:
      columns: `[*stack, d, k]`.
      tolerance: a column with less than this share of its length left counts as dependent.

    Returns:
      Columns of length one or zero, of the same shape, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> orthonormalize(jnp.array([[2.0, 2.0], [0.0, 0.0]])).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    columns = whole_matrices(columns.astype(jnp.promote_types(columns.dtype, jnp.float32)))
    lengths = jnp.linalg.norm(columns, axis=-2, keepdims=True)

    def step(i: Int[Array, ""], basis: Float[Array, "*stack d k"]) -> Float[Array, "*stack d k"]:
        column = jnp.take(columns, i, axis=-1)[..., None] / jnp.where(
            lengths[..., i, None] == 0, 1.0, lengths[..., i, None]
        )
        for _ in range(2):  # once leaves rounding of the size of the machine's epsilon over what is left
            column = project(column, basis, mode="remove")
        left = jnp.linalg.norm(column, axis=-2, keepdims=True)
        column = jnp.where(left > tolerance, column / jnp.where(left == 0, 1.0, left), 0.0)
        return lax.dynamic_update_index_in_dim(basis, column[..., 0], i, axis=-1)

    return lax.fori_loop(0, columns.shape[-1], step, jnp.zeros_like(columns))
