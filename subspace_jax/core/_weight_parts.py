"""Parts of a stand-in weight, and the weight with its axes in another order, shape or layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from subspace_jax.core._errors import RoleError
from subspace_jax.core._role import Role

P = TypeVar("P", bound="WeightParts")


class WeightParts:
    """What follows from the `axes` of a weight's fields: layers, parts, permuted and reshaped weights, their layouts.

    The base of `Weight`, which has the fields that this reads.
    """

    axes: ClassVar[Mapping[str, str]] = {}
    divisible: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        role: Role

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def ndim(self) -> int: ...
        def data_items(self) -> Iterator[tuple[str, Any]]: ...
        def map_fields(self: P, function: Callable[[str, Any], Any]) -> P: ...

    def map_stacked(self: P, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> P:
        """Returns the weight with every array that differs between layers mapped along a stacked axis.

        Args:
          axis: an axis of the array stood for, one of `role.stack_axes`.
          function: takes an array and the position of the stacked axis in it.
        """

        def one(name: str, value: Any) -> Any:
            if isinstance(value, WeightParts):
                return value.map_stacked(axis, function)
            place = self._stacked_place(name, axis)
            return value if place is None else jax.tree.map(lambda array: function(array, place), value)

        return self.map_fields(one)

    def _stacked_place(self, name: str, axis: int) -> int | None:
        """Where a stacked axis of the array is in one field; None if the field serves all layers."""
        words = self.axes[name].split()
        if words == ["array"]:
            return axis
        return self.role.stack_axes.index(axis) if "stack" in words else None

    def split_stack(self: P, axis: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], P]]:
        """Splits off what differs between the slices along a stacked axis.

        Args:
          axis: an axis of the array stood for, one of `role.stack_axes`.

        Returns:
          A dict of arrays whose leading axis runs over the slices, and a function that makes the weight of one
          slice from one slice of that dict.
        """
        mapped: dict[str, Any] = {}
        inner: dict[str, Callable[[dict[str, Any]], Any]] = {}
        for name, value in self.data_items():
            if isinstance(value, WeightParts):
                mapped[name], inner[name] = value.split_stack(axis)
            elif (place := self._stacked_place(name, axis)) is not None:
                mapped[name] = jax.tree.map(lambda array, place=place: jnp.moveaxis(array, place, 0), value)
        role = self.role.without_stack_axis(axis)

        def rebuild(one: dict[str, Any]) -> P:
            fields = {n: inner[n](v) if n in inner else v for n, v in one.items()}
            return _replace(self, role=role, **fields)

        return mapped, rebuild

    def map_axis(self: P, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> P | None:
        """Returns the weight of a part of the array along an input or output axis, or None where it must be formed.

        Args:
          axis: an axis of the array stood for, one of the role's input or output axes.
          function: takes an array and the position of that axis in it, and returns a part of it.
        """
        side = "in" if axis in self.role.in_axes else "out"
        group = self.role.in_axes if side == "in" else self.role.out_axes
        if side not in self.divisible or axis not in group:
            return None
        sizes, place = tuple(self.shape[i] for i in group), group.index(axis)

        def one(name: str, value: Any) -> Any:
            if isinstance(value, WeightParts):
                return value.map_axis(axis, function)
            words = self.axes[name].split()
            if words == ["array"]:
                return function(value, axis)
            if side not in words:
                return value
            at = words.index(side) + value.ndim - len(words)  # `stack` stands for any number of axes
            unfolded = function(value.reshape(*value.shape[:at], *sizes, *value.shape[at + 1 :]), at + place)
            return unfolded.reshape(*value.shape[:at], -1, *value.shape[at + 1 :])

        fields = {name: one(name, value) for name, value in self.data_items()}
        if any(value is None for value in fields.values()):
            return None
        return _replace(self, **fields)

    def permuted(self: P, permutation: tuple[int, ...]) -> P | None:
        """Returns the weight of the array with its axes in another order, or None where it must be formed.

        Args:
          permutation: axis `i` of the new array is axis `permutation[i]` of this one.
        """
        if permutation == tuple(range(self.ndim)):
            return self
        if not self.role.is_matrix:
            return None  # what counts entries counts them in the order of the array
        place = {old: new for new, old in enumerate(permutation)}
        names = ("stack_axes", "in_axes", "out_axes")
        moved = {name: tuple(place[i] for i in getattr(self.role, name)) for name in names}
        role = dataclasses.replace(self.role, **moved)

        def one(name: str, value: Any) -> Any:
            if isinstance(value, WeightParts):
                return value.permuted(permutation)
            return jnp.transpose(value, permutation) if self.axes[name] == "array" else value

        return self._with_fields(one, role)

    def reshape(self: P, shape: tuple[int, ...]) -> P | None:
        """Returns the weight of the reshaped array, or None where the new axes cut across its matrices.

        Args:
          shape: the new shape; its axes must refine or join axes within the stacked, the input and the output
            group, each of which must be neighbors in the array.
        """
        names = ("stack_axes", "in_axes", "out_axes")
        groups = sorted((axes, name) for name in names if (axes := getattr(self.role, name)))
        if [i for axes, _ in groups for i in axes] != list(range(self.ndim)):
            return None
        moved: dict[str, tuple[int, ...]] = {}
        position = 0
        for axes, name in groups:
            start, total, target = position, 1, math.prod(self.shape[i] for i in axes)
            last = axes[-1] == self.ndim - 1
            # A group of size one still takes an axis, and the last one takes all that are left.
            while position < len(shape) and (total < target or position == start or last):
                total *= shape[position]
                position += 1
            moved[name] = tuple(range(start, position))
            if total != target or not moved[name]:
                return None
        role = dataclasses.replace(self.role, **moved)
        depth, stack = len(self.role.stack_axes), tuple(shape[i] for i in role.stack_axes)

        def one(name: str, value: Any) -> Any:
            if isinstance(value, WeightParts):
                return value.reshape(shape)
            if self.axes[name] == "array":
                return value.reshape(shape)
            if len(stack) == depth or "stack" not in self.axes[name].split():
                return value
            return jax.tree.map(lambda array: array.reshape(*stack, *array.shape[depth:]), value)

        return self._with_fields(one, role)

    def _with_fields(self: P, function: Callable[[str, Any], Any], role: Role) -> P | None:
        """Returns the weight with other fields and another role; None where one of the fields must be formed."""
        fields = {name: function(name, value) for name, value in self.data_items()}
        return None if any(value is None for value in fields.values()) else _replace(self, role=role, **fields)

    def partition_specs(self: P, spec: PartitionSpec, *, exact: bool = False) -> P:
        """Returns the weight with the partition spec of each array in its place.

        Args:
          spec: that of the array stood for. Stacked, input and output axes of the parts are split as those of the
            array are; every other axis is replicated. Of several input (or output) axes only a split of the first
            carries over to their product.
          exact: refuse, instead of replicating, where a split does not carry over.

        Raises:
          RoleError: `exact`, and a split does not carry over to the parts.
        """
        # The role knows the number of axes also where a partition has left a hole in the array's place.
        ndim = len(self.role.order) if self.role.is_matrix else self.ndim
        entries = (*spec, *(None,) * (ndim - len(spec)))

        def group(axes: tuple[int, ...]) -> Any:
            if exact and any(entries[i] is not None for i in axes[1:]):
                raise RoleError(
                    f"{type(self).__name__} of shape {self.shape}: split {spec} on axes {axes}, of which only the "
                    "first can be split here; shard another axis, or merge() the weight first."
                )
            return entries[axes[0]] if axes else None

        words: dict[str, tuple[Any, ...]] = {"in": (group(self.role.in_axes),), "out": (group(self.role.out_axes),)}
        words["stack"] = tuple(entries[i] for i in self.role.stack_axes)

        def one(name: str, value: Any) -> Any:
            if isinstance(value, WeightParts):
                return value.partition_specs(spec, exact=exact)
            if self.axes[name] == "array":
                return PartitionSpec(*entries)
            found = _without_repeats([e for w in self.axes[name].split() for e in words.get(w, (None,))])
            return jax.tree.map(lambda _: found, value)

        return self.map_fields(one)


def _replace(weight: P, **changes: Any) -> P:
    return dataclasses.replace(weight, **changes)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]


def _without_repeats(entries: list[Any]) -> PartitionSpec:
    """A spec in which each mesh axis splits one axis only: the first of those that ask for it."""
    used: set[Any] = set()
    kept: list[Any] = []
    for entry in entries:
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None, PartitionSpec.UNCONSTRAINED}
        kept.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*kept)
