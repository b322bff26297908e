"""A frozen array of which single entries learn, kept as a list of positions and one of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

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

    Attributes:
      base: \(W\), of the weight's shape.
      indices: positions, ascending, `[*stack, k]` int32.
      values: what those entries are, or what is added to them, `[*stack, k]` float32.
      active: which values still learn, `[*stack, k]` bool; None for all. The others keep their value and get no
        gradient.
      mode: "set" or "add".
    """

    base: jax.Array
    indices: jax.Array
    values: jax.Array
    active: jax.Array | None = None
    mode: SparseMode = static(default="set")

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "indices": "stack entry",
        "values": "stack entry",
        "active": "stack entry",
    }

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
        return self.indices.shape[-1]

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the values in their places, cast once; all other entries are those of `base`."""
        one = self.with_frozen_stopped()
        values = one.values
        if one.active is not None:
            values = jnp.where(one.active, values, lax.stop_gradient(values))
        return one._write(one.base, one.indices, values, self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, use: Use) -> jax.Array:
        """Returns the operation on the formed array, of which the backward pass keeps nothing."""

        @jax.custom_vjp
        def apply(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any) -> jax.Array:
            del active
            # Barriers put the forming of the array behind its input: left free, the compiler forms the arrays of all
            # layers first, and keeps those of the forward pass for the backward one.
            x, indices, values = lax.optimization_barrier((x, indices, values))
            return use.apply(x, self._write(base, indices, values, use.dtype))

        def forward(x: jax.Array, base: jax.Array, indices: jax.Array, values: jax.Array, active: Any):
            return apply(x, base, indices, values, active), (x, base, indices, values, active)

        def backward(saved: Any, cotangent: jax.Array):
            x, base, indices, values, active = saved
            indices, values, cotangent = lax.optimization_barrier((indices, values, cotangent))
            _, pull = jax.vjp(use.apply, x, self._write(base, indices, values, use.dtype))
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
            flat = flat_entries(base, self.role)
            if self.mode == "add":
                values = _gather(flat, indices).astype(wide) + values
            return unflat_entries(_scatter(flat.astype(dtype), indices, values.astype(dtype)), self.role, base.shape)

        return placed_as(write, base)(base, indices, values)


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
    if flat.shape[-1] >= 2**31:
        raise RoleError(
            f"shape {array.shape} has {flat.shape[-1]} entries in one layer; positions are int32, so at most "
            f"{2**31 - 1} can be counted. Split the weight, or leave it out of the pattern."
        )
    return flat


def unflat_entries(flat: jax.Array, role: Role, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of `shape` whose `flat_entries` are the given ones."""
    order = _order(role, len(shape))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(flat.reshape([shape[i] for i in order]), inverse)


def entries_at(array: jax.Array, indices: jax.Array, role: Role, *, like: jax.Array | None = None) -> jax.Array:
    """Returns the entries at the given positions, `[*stack, k]`; 0 at padding.

    Args:
      array: of this role.
      indices: positions, `[*stack, k]`.
      role: of the array.
      like: an array laid out as the result shall be, where mesh axes are explicit; `indices` if None.

    Example:
      >>> import jax.numpy as jnp
      >>> entries_at(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 2, 4]), Role.dense()).tolist()
      [2.0, 3.0, 0.0]
    """

    def pick(array: jax.Array, indices: jax.Array) -> jax.Array:
        return _gather(flat_entries(array, role), indices)

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


def _gather(flat: jax.Array, indices: jax.Array) -> jax.Array:
    def of_one(flat: jax.Array, indices: jax.Array) -> jax.Array:
        return flat.at[indices].get(mode="fill", fill_value=0, indices_are_sorted=True)

    return jnp.vectorize(of_one, signature="(s),(k)->(k)")(flat, indices)


def _scatter(flat: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    def of_one(flat: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
        return flat.at[indices].set(values, mode="drop", indices_are_sorted=True)

    return jnp.vectorize(of_one, signature="(s),(k),(k)->(s)")(flat, indices, values)


def placed_as(function: Callable[..., jax.Array], reference: jax.Array) -> Callable[..., jax.Array]:
    """Returns the function with its result laid out as `reference`, where mesh axes are explicit.

    Positions run across all splits of an array; inside, the compiler says what goes where.
    """
    sharding = jax.typeof(reference).sharding
    if not sharding.mesh.explicit_axes:
        return function
    placed: Any = jax.sharding.auto_axes(function, out_sharding=sharding)
    return placed
