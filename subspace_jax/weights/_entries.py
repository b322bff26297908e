"""Reads and writes entries of an array by position, and moves values from one list of positions to another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Role, RoleError


def flat_entries(array: jax.Array, role: Role) -> jax.Array:
    """Flattens every layer's entries in the order in which sparse positions number them, `[*stack, S]`.

    Args:
      array: of this role.
      role: says which axes are stacked, and, for a matrix, which are inputs and outputs.

    Raises:
      RoleError: one layer has more entries than an int32 can count.

    Example:
      >>> import jax.numpy as jnp
      >>> flat_entries(jnp.ones((3, 2, 4)), Role.dense((1,), (2,), stack_axes=(0,))).shape
      (3, 8)
    """
    stack = role.stack_shape(array.shape)
    flat = jnp.transpose(array, _order(role, array.ndim)).reshape(*stack, -1)
    _check_count(array.shape, flat.shape[-1])
    return flat


def unflat_entries(flat: jax.Array, role: Role, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of `shape` whose `flat_entries` are the given ones."""
    order = _order(role, len(shape))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(flat.reshape([shape[i] for i in order]), inverse)


def entries_at(array: jax.Array, indices: jax.Array, role: Role, *, like: jax.Array | None = None) -> jax.Array:
    """Returns the entries at the given positions, in the shape of `indices`; 0 at padding.

    Args:
      array: of this role.
      indices: positions, `[*stack, k]`; or in blocks, `[*stack, rows, cols, k]`.
      role: of the array.
      like: an array laid out as the result shall be, where mesh axes are explicit; `indices` if None.

    Example:
      >>> import jax.numpy as jnp
      >>> entries_at(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 2, 4]), Role.dense()).tolist()
      [2.0, 3.0, 0.0]
    """

    def pick(array: jax.Array, indices: jax.Array) -> jax.Array:
        return gather_entries(in_grid(array, role, blocks_of(indices, role)), indices)

    return placed_as(pick, indices if like is None else like)(array, indices)


def migrate_entries(values: jax.Array, old: jax.Array, new: jax.Array, missing: jax.Array | float = 0.0) -> jax.Array:
    r"""Moves values from one list of positions to another, in \(O(k \log k)\).

    Args:
      values: one per old position, `[*stack, k]`.
      old: positions, ascending, `[*stack, k]`.
      new: the new ones, ascending, `[*stack, n]`.
      missing: what a position gets that was not among the old ones; a number or `[*stack, n]`.

    Returns:
      `[*stack, n]`, of the dtype of `values`.

    Example:
      >>> import jax.numpy as jnp
      >>> migrate_entries(jnp.array([1.0, 2.0]), jnp.array([3, 7]), jnp.array([5, 7])).tolist()
      [0.0, 2.0]
    """

    def of_one(values: jax.Array, old: jax.Array, new: jax.Array, missing: jax.Array) -> jax.Array:
        place = jnp.minimum(jnp.searchsorted(old, new), max(old.shape[0] - 1, 0))
        return jnp.where(old[place] == new, values[place], missing)

    missing = jnp.broadcast_to(jnp.asarray(missing, values.dtype), new.shape)
    if not old.shape[-1]:
        return missing
    return jnp.vectorize(of_one, signature="(k),(k),(n),(n)->(n)")(values, old, new, missing)


def _order(role: Role, ndim: int) -> tuple[int, ...]:
    """The axes of the array, the stacked ones first."""
    if role.is_matrix:
        return role.order
    return (*role.stack_axes, *(i for i in range(ndim) if i not in role.stack_axes))


def _check_count(shape: tuple[int, ...], count: int) -> None:
    if count >= 2**31:
        raise RoleError(
            f"shape {shape} has {count} entries in one layer or block; positions are int32, so at most "
            f"{2**31 - 1} can be counted. Split the weight, or leave it out of the pattern."
        )


def blocks_of(indices: jax.Array, role: Role) -> tuple[int, ...]:
    """Blocks each way, `(rows, cols)`; empty for one list of the whole matrix."""
    return indices.shape[len(role.stack_axes) : -1]


def in_blocks(matrix: jax.Array, rows: int, cols: int) -> jax.Array:
    """Returns matrices `[*stack, in, out]` cut into equal blocks, `[*stack, rows, cols, in / rows, out / cols]`.

    Example:
      >>> import jax.numpy as jnp
      >>> in_blocks(jnp.arange(8).reshape(2, 4), 1, 2).tolist()
      [[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]]
    """
    *stack, inputs, outputs = matrix.shape
    return jnp.swapaxes(matrix.reshape(*stack, rows, inputs // rows, cols, outputs // cols), -2, -3)


def in_grid(array: jax.Array, role: Role, blocks: tuple[int, ...] = ()) -> jax.Array:
    """Returns the array as `[*stack, *blocks, m, n]`, in which positions count row by row; m is 1 for a vector.

    Never one long axis: a matrix that is split both ways could not be flattened without being gathered.
    """
    if not role.is_matrix:
        return flat_entries(array, role)[..., None, :]
    matrix = role.matrix(array)
    inputs, outputs = matrix.shape[-2:]
    _check_count(array.shape, inputs * outputs // math.prod(blocks))
    if not blocks:
        return matrix
    return in_blocks(matrix, *blocks)


def from_grid(grid: jax.Array, role: Role, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of `shape` whose `in_grid` is the given one."""
    if not role.is_matrix:
        return unflat_entries(grid[..., 0, :], role, shape)
    if grid.ndim == len(role.stack_axes) + 4:
        grid = jnp.swapaxes(grid, -2, -3)
        grid = grid.reshape(*grid.shape[:-4], *role.sizes(shape))
    return role.unmatrix(grid, shape)


@functools.partial(jax.jit, inline=True)
def gather_entries(grid: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns the entries of an `in_grid` array at positions of its last two axes; 0 at padding."""

    def of_one(matrix: jax.Array, indices: jax.Array) -> jax.Array:
        return matrix.at[jnp.divmod(indices, matrix.shape[1])].get(mode="fill", fill_value=0)

    return jnp.vectorize(of_one, signature="(m,n),(k)->(k)")(grid, indices)


@functools.partial(jax.jit, inline=True)
def scatter_entries(grid: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Returns an `in_grid` array with values written at positions of its last two axes; padding writes nothing."""

    def of_one(matrix: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
        places = jnp.divmod(indices, matrix.shape[1])
        return matrix.at[places].set(values, mode="drop", indices_are_sorted=True)

    return jnp.vectorize(of_one, signature="(m,n),(k),(k)->(m,n)")(grid, indices, values)


def placed_as(function: Callable[..., jax.Array], reference: jax.Array) -> Callable[..., jax.Array]:
    """Returns the function with its result laid out as `reference`, where mesh axes are explicit.

    Positions run across all splits of an array; inside, the compiler says what goes where.
    """
    sharding = jax.typeof(reference).sharding
    if not sharding.mesh.explicit_axes:
        return function
    placed: Any = jax.sharding.auto_axes(function, out_sharding=sharding)
    return placed
