"""A frozen array of which single entries learn, kept as lists of positions and of values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from subspace_jax.core import Role, RoleError, Use, Weight, static
from subspace_jax.linalg import wide_dtype

SparseMode = Literal["set", "add"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDelta(Weight):
    r"""\(W\) with a few entries replaced ("set") or changed ("add") by trained values.

    The values, their gradient and the optimiser's state are lists of \(k\) numbers; no mask of the weight's size
    exists. A use forms the changed array, applies the model's operation and forgets the array: the backward pass
    keeps only the input, the list and the reference to \(W\), forms the array anew, and picks the \(k\) entries out
    of its gradient, which is a temporary of one layer.

    Positions count the entries of one layer's matrix `[in, out]` row by row (of an array that is no matrix: its
    entries in order). A slot whose position is \(S\), the number of entries, is padding: it changes nothing.

    On a mesh the lists may be split over all devices (`sj.shardings` does so). A use then sends the lists, never the
    array: every device writes the entries that it holds. `SparseBlocks` sends nothing.

    Attributes:
      base: \(W\), of the weight's shape.
      indices: positions, ascending, `[*stack, k]` int32.
      values: what those entries are, or what is added to them, `[*stack, k]` float32.
      active: which values still learn, `[*stack, k]` bool; None for all. The others keep their value and get no
        gradient.
      mode: "set" or "add".
      keep_formed: keep the formed array for the backward pass. Right under rematerialisation, where the forward pass
        runs again just before the backward one: the array is then formed, and on a mesh gathered, once for both.
    """

    base: jax.Array
    indices: jax.Array
    values: jax.Array
    active: jax.Array | None = None
    mode: SparseMode = static(default="set")
    keep_formed: bool = static(default=False)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "indices": "stack entry",
        "values": "stack entry",
        "active": "stack entry",
    }
    spread: ClassVar[Mapping[str, int]] = {"indices": -1, "values": -1, "active": -1}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def formed(self) -> bool:
        """True for vectors: biases and scales cost nothing to form, and are added rather than multiplied."""
        return self.ndim - len(self.role.stack_axes) <= 1

    @property
    def count(self) -> int:
        r"""\(k\), the number of slots of one layer."""
        return math.prod(self.indices.shape[len(self.role.stack_axes) :])

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the values in their places, cast once; all other entries are those of `base`."""
        one = self.with_frozen_stopped()
        values = one.values
        if one.active is not None:
            values = jnp.where(one.active, values, lax.stop_gradient(values))
        return one._write(one.base, one.indices, values, self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, use: Use) -> jax.Array:
        """Returns the operation on the formed array, of which nothing is kept unless `keep_formed` says so."""

        @jax.custom_vjp
        def apply(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any) -> jax.Array:
            return forward(x, base, indices, values, active)[0]

        def forward(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any):
            # Barriers put the forming of the array behind its input: left free, the compiler forms the arrays of all
            # layers first, and keeps those of the forward pass for the backward one.
            behind, where, what = lax.optimization_barrier((x, indices, values))
            formed = self._write(base, where, what, use.dtype)
            return use.apply(behind, formed), (x, base, indices, values, active, formed if self.keep_formed else None)

        def backward(saved: Any, cotangent: jax.Array):
            x, base, indices, values, active, formed = saved
            if formed is None:
                indices, values, cotangent = lax.optimization_barrier((indices, values, cotangent))
                formed = self._write(base, indices, values, use.dtype)
            _, pull = jax.vjp(use.apply, x, formed)
            x_cotangent, array_cotangent = pull(cotangent)
            picked = entries_at(array_cotangent, indices, self.role, like=values).astype(values.dtype)
            if active is not None:
                picked = jnp.where(active, picked, jnp.zeros((), picked.dtype))
            return x_cotangent, None, None, picked, None

        apply.defvjp(forward, backward)
        return apply(x, self.base, self.indices, self.values, self.active)

    def _write(self, base: jax.Array, indices: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
        """Forms the array, of `dtype`."""
        wide = wide_dtype(base.dtype)

        def write(base: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
            grid = _grid(base, self.role, _blocks_of(indices, self.role))
            if self.mode == "add":
                values = _gather(grid, indices).astype(wide) + values
            return _ungrid(_scatter(grid.astype(dtype), indices, values.astype(dtype)), self.role, base.shape)

        return placed_as(write, base)(base, indices, values)

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> SparseDelta:
        """As for `Weight`; with `exact` a split matrix is refused where positions count the whole one.

        Raises:
          RoleError: `exact`, and the array is split along an axis that is not stacked.
        """
        split = any(entry is not None for i, entry in enumerate(spec) if i not in self.role.stack_axes)
        if exact and split and self.spread:
            raise RoleError(
                f"SparseDelta of shape {self.shape}: split {spec}, but its positions count the whole matrix; select "
                "by blocks (for sj.lift: blocks=), or merge() the weight first."
            )
        return super().partition_specs(spec, exact=exact)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseBlocks(SparseDelta):
    r"""`SparseDelta` with a list of its own for every block of the matrix, so that each device needs its lists alone.

    The matrix is cut into `rows` times `cols` blocks of equal shape, all with the same number of slots. Where the
    weight is split over as many devices, or a divisor of it, on each side, writing the values and picking their
    gradients send nothing.

    Attributes:
      base: as for `SparseDelta`; a matrix.
      indices: positions in the block, row by row, ascending, `[*stack, rows, cols, k]` int32; padding is the number of
        a block's entries.
      values: `[*stack, rows, cols, k]` float32.
      active: `[*stack, rows, cols, k]` bool, or None.
      mode: as for `SparseDelta`.
      keep_formed: as for `SparseDelta`.
    """

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "indices": "stack in out entry",
        "values": "stack in out entry",
        "active": "stack in out entry",
    }
    spread: ClassVar[Mapping[str, int]] = {}


def flat_entries(array: jax.Array, role: Role) -> jax.Array:
    """Returns the entries of every layer in the order that positions count, `[*stack, S]`.

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
        return _gather(_grid(array, role, _blocks_of(indices, role)), indices)

    return placed_as(pick, indices if like is None else like)(array, indices)


def migrate_entries(values: jax.Array, old: jax.Array, new: jax.Array, missing: jax.Array | float = 0.0) -> jax.Array:
    r"""Carries values that belong to positions over to a new list of positions, in \(O(k \log k)\).

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


def _blocks_of(indices: jax.Array, role: Role) -> tuple[int, ...]:
    """Blocks each way, `(rows, cols)`; empty for one list of the whole matrix."""
    return indices.shape[len(role.stack_axes) : -1]


def _grid(array: jax.Array, role: Role, blocks: tuple[int, ...] = ()) -> jax.Array:
    """The array as `[*stack, *blocks, m, n]`, whose entries positions count row by row; of no matrix m is 1.

    Never one long axis: a matrix that is split both ways could not be flattened without being gathered.
    """
    if not role.is_matrix:
        return flat_entries(array, role)[..., None, :]
    matrix = role.matrix(array)
    *stack, inputs, outputs = matrix.shape
    _check_count(array.shape, inputs * outputs // math.prod(blocks))
    if not blocks:
        return matrix
    rows, cols = blocks
    return jnp.swapaxes(matrix.reshape(*stack, rows, inputs // rows, cols, outputs // cols), -2, -3)


def _ungrid(grid: jax.Array, role: Role, shape: tuple[int, ...]) -> jax.Array:
    """The array of `shape` whose `_grid` is the given one."""
    if not role.is_matrix:
        return unflat_entries(grid[..., 0, :], role, shape)
    if grid.ndim == len(role.stack_axes) + 4:
        grid = jnp.swapaxes(grid, -2, -3)
        grid = grid.reshape(*grid.shape[:-4], *role.sizes(shape))
    return role.unmatrix(grid, shape)


def _gather(grid: jax.Array, indices: jax.Array) -> jax.Array:
    def of_one(matrix: jax.Array, indices: jax.Array) -> jax.Array:
        return matrix.at[jnp.divmod(indices, matrix.shape[1])].get(mode="fill", fill_value=0)

    return jnp.vectorize(of_one, signature="(m,n),(k)->(k)")(grid, indices)


def _scatter(grid: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
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
