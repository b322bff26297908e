"""Kernels that a model joins into one before it uses them: each answers its own part of the product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from subspace_jax.core._compat import is_tracer
from subspace_jax.core._errors import RoleError
from subspace_jax.core._full import Full
from subspace_jax.core._labels import reshape_groups
from subspace_jax.core._observed import Observed
from subspace_jax.core._operation import Operation
from subspace_jax.core._operations import Convolution, Lookup
from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._weight import Weight, static


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(Weight):
    """Stands for arrays side by side along one axis while a program runs; nothing keeps it.

    Attributes:
      parts: the weights; an ordinary array is a `Full`.
      axis: along which they are joined.
      names: path of each part in the arguments.
    """

    parts: tuple[Weight, ...]
    axis: int = static()
    names: tuple[str, ...] = static()

    axes: ClassVar[Mapping[str, str]] = {"parts": "parts"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the joined array."""
        first, total = self.parts[0].shape, sum(self.sizes)
        return (*first[: self.axis], total, *first[self.axis + 1 :])

    @property
    def sizes(self) -> list[int]:
        """How long each part is along the joined axis."""
        return [part.shape[self.axis] for part in self.parts]

    @property
    def mergeable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether an array stands for every part."""
        return all(part.mergeable for part in self.parts)

    @property
    def uses_context(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part reads or writes the operation's context."""
        return any(part.uses_context for part in self.parts)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the joined array."""
        dtype = self.dtype if dtype is None else dtype
        return jnp.concatenate([part.materialize(dtype) for part in self.parts], axis=self.axis)

    def leaf_paths(self, path: str) -> tuple[str, ...]:
        """Returns the paths of the parts."""
        return tuple(dict.fromkeys(filter(None, self.names))) or (path,)

    def answers(self, operation: Operation) -> bool:
        """Tells whether the operation's result is made of those of the parts: joined, or added up."""
        return any(isinstance(p, Observed) for p in self.parts) or self._can_divide(operation)

    def _can_divide(self, operation: Operation) -> bool:
        if isinstance(operation, Convolution) and not operation.mixes_features:
            return False
        if isinstance(operation, Lookup) and self.ndim > 2:
            return False  # a choice among kernels
        return self._label in operation.out_labels or self._axis_of_x(operation) is not None

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the parts' results side by side where the joined axis is one of the result, else their sum."""
        place, results, start = self._axis_of_x(operation), [], 0
        whole = None if self._can_divide(operation) else self.materialize()  # of leaves that only observe
        for i, (part, size) in enumerate(zip(self.parts, self.sizes, strict=True)):
            fields = {"role": part.role, "shape": part.shape, "path": (*operation.path, i), "name": self.names[i]}
            own = dataclasses.replace(operation, **fields)
            if whole is None:
                mine = x if place is None else lax.slice_in_dim(x, start, start + size, axis=place)
                results.append(part.contract(mine, own))
            elif isinstance(part, Observed):
                part.record(own)
            start += size
        if whole is not None:
            return operation.apply(x, whole)
        if self._label in operation.out_labels:
            return jnp.concatenate(results, axis=operation.out_labels.index(self._label))
        return sum(results[1:], results[0])

    @property
    def _label(self) -> str:
        return f"w{self.axis}"

    def _axis_of_x(self, operation: Operation) -> int | None:
        """The axis of the other operand that meets the joined one."""
        if isinstance(operation, Convolution):
            return operation.x_feature if self.axis == operation.feature_axes[0] else None
        return operation.x_labels.index(self._label) if self._label in operation.x_labels else None

    def _with(self, parts: Sequence[Weight | None], axis: int) -> Joined | None:
        """The same of other parts; None if one of them has to be formed."""
        found = tuple(p for p in parts if p is not None)
        if len(found) != len(parts):
            return None
        return dataclasses.replace(self, parts=found, axis=axis, role=found[0].role)

    def can_split(self, axis: int, *, loop: bool) -> bool:
        """Tells whether an axis runs over whole layers; the joined one does in a loop over parts of one form."""
        if axis != self.axis:
            return all(part.can_split(axis, loop=loop) for part in self.parts)
        return loop and self._slices() is not None

    def _slices(self) -> list[Weight] | None:
        """The parts' slices along the joined axis, if all have one form."""
        found: list[Weight] = []
        for part in self.parts:
            if part.shape[self.axis] == 1:
                one = part.reshape(tuple(n for i, n in enumerate(part.shape) if i != self.axis))
                found += [] if one is None else [one]
            elif part.can_split(self.axis, loop=True):
                mapped, rebuild = part.split_stack(self.axis)
                found += [rebuild(jax.tree.map(lambda v, i=i: v[i], mapped)) for i in range(part.shape[self.axis])]
        watched = next((p.notes for p in self.parts if isinstance(p, Observed)), None)
        if watched is not None:
            found = [dataclasses.replace(w, notes=watched) if isinstance(w, Observed) else w for w in found]
        forms = {(jax.tree.structure(w), tuple((v.shape, v.dtype) for v in jax.tree.leaves(w))) for w in found}
        return found if len(found) == self.shape[self.axis] and len(forms) == 1 else None

    def split_stack(self, axis: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
        """Splits off what differs between the slices along an axis."""
        if axis == self.axis:
            slices = self._slices()
            assert slices is not None  # can_split
            notes = [part.notes for part in self.parts if isinstance(part, Observed)]
            if notes:
                notes[0].share(notes[1:])
            leaves = [jax.tree.leaves(one) for one in slices]
            form = jax.tree.structure(slices[0])
            stacked = {str(i): jnp.stack(column) for i, column in enumerate(zip(*leaves, strict=True))}
            return stacked, lambda one: jax.tree.unflatten(form, [one[str(i)] for i in range(form.num_leaves)])
        pairs = [part.split_stack(axis) for part in self.parts]

        def rebuild(one: dict[str, Any]) -> Joined | None:
            parts = [again(one[str(i)]) for i, (_, again) in enumerate(pairs)]
            return self._with(parts, self.axis - (axis < self.axis))

        return {str(i): mapped for i, (mapped, _) in enumerate(pairs)}, rebuild

    def map_stacked(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> Any:
        """Returns the weight with every array that differs between layers mapped along a stacked axis."""
        return self._with([part.map_stacked(axis, function) for part in self.parts], self.axis)

    def map_axis(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> Weight | None:
        """Returns the weight of a part of the array along an axis; across the parts if it is known while tracing."""
        if axis != self.axis:
            return self._with([part.map_axis(axis, function) for part in self.parts], axis=self.axis)
        with jax.ensure_compile_time_eval():
            found = function(jnp.arange(self.shape[axis]), 0)
        if is_tracer(found):
            return None
        chosen = np.asarray(found)
        parts, names, start = [], [], 0
        for part, name, size in zip(self.parts, self.names, self.sizes, strict=True):
            mine = chosen[(start <= chosen) & (chosen < start + size)] - start
            start += size
            if len(mine):
                whole = np.array_equal(mine, np.arange(size))
                parts.append(part if whole else part.map_axis(axis, lambda v, at, mine=mine: jnp.take(v, mine, at)))
                names.append(name)
        joined = self._with(parts, axis)
        if joined is None or np.any(np.diff(chosen) < 0):
            return None
        return joined.parts[0] if len(parts) == 1 else dataclasses.replace(joined, names=tuple(names))

    def permuted(self, permutation: tuple[int, ...]) -> Any:
        """Returns the weight of the array with its axes in another order."""
        return self._with([part.permuted(permutation) for part in self.parts], permutation.index(self.axis))

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Returns the weight of the reshaped array, if each part stays one along one of the new axes."""
        for old, new in reshape_groups(self.shape, shape) or ():
            if self.axis not in old:
                continue
            before = [i for i in old if i < self.axis and self.shape[i] > 1]
            axis = next((i for i in new if shape[i] > 1), new[0])
            # Of the axes that are joined or split, each part takes its share of the first.
            shares = [n * shape[axis] for n in self.sizes]
            total = sum(self.sizes)
            if before or any(n % total for n in shares):
                return None
            shapes = [(*shape[:axis], n // total, *shape[axis + 1 :]) for n in shares]
            return self._with([part.reshape(s) for part, s in zip(self.parts, shapes, strict=True)], axis)
        return None

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> Any:
        """Returns the weight with the partition spec of each array in its place."""
        if exact and self.axis < len(spec) and spec[self.axis] is not None:
            raise RoleError(
                f"{', '.join(self.names)}: joined along axis {self.axis}, which the model then splits over "
                f"{spec[self.axis]!r} by shard_map. Split the parts, or merge() these leaves first."
            )
        return dataclasses.replace(self, parts=tuple(p.partition_specs(spec, exact=exact) for p in self.parts))

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array | None:
        """Returns the array where the parts only observe how they are used."""
        found = [p.materialize() if isinstance(p, Full) else p.observe(primitive, path) for p in self.parts]
        arrays = [v for v in found if v is not None]
        return jnp.concatenate(arrays, axis=self.axis) if len(arrays) == len(found) else None

    def follow(self, primitive: str, path: tuple[int, ...], operands: Sequence[Any], results: list[Any]) -> list[Any]:
        """Returns an operation's results, observed further by the first part that observes."""
        first = next(part for part in self.parts if not isinstance(part, Full))
        return first.follow(primitive, path, operands, results)
