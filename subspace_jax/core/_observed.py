"""A leaf that records how a model uses it, for `roles`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core._labels import reshape_groups
from subspace_jax.core._operation import Operation
from subspace_jax.core._operations import Convolution, Dot, Lookup, RaggedDot
from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._role import Kind, Role
from subspace_jax.core._weight import Weight, static
from subspace_jax.core._weight_view import WeightView

# Elementwise primitives by what they make of a leaf.
_ELEMENTWISE: dict[str, Kind] = {"add": "bias", "add_any": "bias", "sub": "bias", "mul": "scale", "div": "scale"}
# Primitives that change the numbers of an array and not what its axes are.
_SAME_AXES = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "round", "floor", "ceil", "clamp", "select_n"),
    *("tanh", "exp", "log", "log1p", "expm1", "logistic", "erf", "sqrt", "rsqrt", "square", "pow", "integer_pow"),
    *("reduce_precision", "convert_element_type", "sin", "cos", "nextafter", "rem", "real", "stop_gradient"),
}
_KINDS: dict[type[Operation], Kind] = {Dot: "dense", RaggedDot: "dense", Convolution: "conv", Lookup: "embedding"}
# Of several uses the first in this order counts.
_ORDER = ("embedding", "conv", "dense", "scale", "bias", "other")


class Notes:
    """The recorded uses of one leaf; a place in the program that is traced twice counts once."""

    def __init__(self) -> None:
        self.uses: dict[tuple[int, ...], Role] = {}
        self.stack_axes: list[int] = []
        self.reads_rows = False

    def stack(self, axis: int) -> None:
        """Records that an axis runs over whole layers."""
        if axis not in self.stack_axes:
            self.stack_axes.append(axis)

    def share(self, others: Sequence[Notes]) -> None:
        """From now on all of these record each other's uses: their leaves run through one loop."""
        for other in others:
            self.uses |= other.uses
            other.uses = self.uses

    def role(self, ndim: int) -> Role:
        """The role that fits the uses.

        A lookup outweighs a tied output. Of several products the most frequent form counts, which is the model's own
        where a norm of the kernel multiplies it from the other side as well, then the first.
        """
        found = list(self.uses.values())
        main = min(found, key=lambda r: (_ORDER.index(r.kind), -found.count(r)), default=None)
        if self.reads_rows and ndim == 2 and (main is None or main.kind not in ("scale", "bias")):
            # Rows by a traced number, one at a time: a table, unless they are layers' vectors.
            return Role("embedding", (), (0,), (1,), uses=max(len(found), 1), found=True)
        if main is None:
            return Role("unused", tuple(self.stack_axes), uses=0, found=True)
        # What is looked up and then multiplied with is no table but a stack of kernels.
        main = next((r for r in found if main.kind == "embedding" and r.kind == "dense" and r.stack_axes), main)
        if main.kind == "scale" and any(r.primitive == "add" for r in found):
            main = dataclasses.replace(main, primitive="add")
        outer = tuple(self.stack_axes)
        inner = tuple(a for a in main.stack_axes if a not in outer)
        sides = {name: tuple(a for a in getattr(main, name) if a not in outer) for name in ("in_axes", "out_axes")}
        return dataclasses.replace(main, stack_axes=outer + inner, uses=len(found), found=True, **sides)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed(Weight):
    """A leaf that records its uses and otherwise behaves as the array.

    Attributes:
      value: the array.
      notes: where uses are written.
      original: axis `i` of the value is made of the axes `original[i]` of the leaf.
      whole: False once axes cannot be told, because the value was broadcast, reduced or padded.
      computed: a norm or the like, which says nothing about the leaf by what it is added to or multiplied with.
    """

    value: jax.Array
    notes: Notes = static()
    original: tuple[tuple[int, ...], ...] = static()
    whole: bool = static(default=True)
    computed: bool = static(default=False)

    axes: ClassVar[Mapping[str, str]] = {"value": "array"}

    @classmethod
    def of(cls, array: Any, notes: Notes) -> Observed:
        """Returns a leaf as it enters the model."""
        axes = tuple((i,) for i in range(array.ndim))
        options: dict[str, Any] = {"role": Role("other"), "dtype": array.dtype, "trainable": ("value",)}
        return cls(value=array, notes=notes, original=axes, **options)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.value.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the value."""
        return self.value if dtype is None else self.value.astype(dtype)

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array:
        """Records a use by an operation on the array."""
        kind = "other" if self.computed else _ELEMENTWISE.get(primitive, "other")
        self.notes.uses[path] = Role(kind, primitive=primitive if kind == "other" else "")
        return self.value

    def observe_row(self) -> None:
        """Records that one row is read by a traced number: perhaps of a table."""
        self.notes.reads_rows = True

    def follow(self, primitive: str, path: tuple[int, ...], operands: Sequence[Any], results: list[Any]) -> list[Any]:
        """Goes on observing what is computed of leaves and numbers alone: a kernel scaled, masked or normalized."""
        rest = [v for v in operands if not isinstance(v, WeightView)]
        if primitive != "select_n" and any(jnp.size(v) > 1 and v.dtype != bool for v in rest):
            seen = next(v.shape for v in operands if isinstance(v, WeightView))
            matrix = sum(n > 1 for n in seen) > 1 and primitive in ("mul", "div")
            if matrix and any(jnp.shape(v) == seen for v in rest):
                # Entry by entry with an array of the leaf's shape: a mask, as likely as anything.
                self.notes.uses[path] = Role("other", primitive=primitive)
            along_axes = matrix and all(jnp.size(v) < self.size and results[0].shape == seen for v in rest)
            if not along_axes:  # what scales rows or columns leaves the kernel one
                return results
        self.notes.uses[path] = Role("other", primitive=primitive)
        views = [(v, v.weight) for v in operands if isinstance(v, WeightView) and isinstance(v.weight, Observed)]
        out = []
        for value in results:
            if not jnp.issubdtype(value.dtype, jnp.floating):  # an index, a comparison
                out.append(value)
                continue
            same = (o for v, o in views if o.whole and v.shape == value.shape and primitive in _SAME_AXES)
            source = next(same, None)
            if source is None:
                options = {"original": ((),) * value.ndim, "whole": False, "computed": True, "dtype": value.dtype}
                out.append(WeightView.of(dataclasses.replace(self, value=value, **options), ""))
                continue
            view = next(v for v, o in views if o is source)
            original = tuple(source.original[i] for i in view.permutation)
            made = dataclasses.replace(source, value=value, original=original, dtype=value.dtype)
            out.append(WeightView.of(made, view.path))
        return out

    def contract(self, x: jax.Array, operation: Operation) -> Any:
        """Records a product, convolution or lookup."""
        self.record(operation)
        result = operation.apply(x, self.value)
        if isinstance(operation, Lookup) and self.ndim > 2 and self.whole:
            # Perhaps a choice among kernels, which the next product tells.
            names = dict(zip(operation.weight_labels, self.original, strict=True))
            index = names[operation.in_labels[0]]
            original = tuple(names.get(n, index) for n in operation.out_labels)
            made = dataclasses.replace(self, value=result, original=original, computed=True, dtype=result.dtype)
            return WeightView.of(made, "")
        return result

    def record(self, operation: Operation) -> None:
        """Records a product, convolution or lookup that something else answers."""
        self.notes.uses[operation.path] = self._role_in(operation)

    def _role_in(self, operation: Operation) -> Role:
        if not self.whole:
            return Role("other", primitive="reshape")
        batch = operation.batch_labels
        groups = operation.parameters["feature_group_count"] if isinstance(operation, Convolution) else 1
        parts: dict[str, list[int]] = {"batch": [], "in": [], "out": []}
        for name, axes in zip(operation.weight_labels, self.original, strict=True):
            part = "batch" if name in batch else "in" if name in operation.in_labels else "out"
            parts[part] += [i for i in axes if i not in parts[part]]
        if len({i for found in parts.values() for i in found}) != sum(map(len, parts.values())):
            return Role("other", primitive="reshape")  # it cuts an axis of the leaf into parts of several groups
        stack, inputs, outputs = (tuple(parts[n]) for n in ("batch", "in", "out"))
        return Role(_KINDS[type(operation)], stack, inputs, outputs, groups)

    def can_split(self, axis: int, *, loop: bool) -> bool:
        """Tells whether an axis may run over layers: any one in a loop, else the first."""
        return self.whole and (loop or (axis == 0 and self.ndim > 1))

    def map_stacked(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> Observed:
        """Returns some of the layers."""
        return dataclasses.replace(self, value=function(self.value, axis))

    def map_axis(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> Observed:
        """Returns a part of the array along an axis."""
        return dataclasses.replace(self, value=function(self.value, axis))

    def split_stack(self, axis: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Observed]]:
        """Splits off an axis over layers, and records it."""
        for i in self.original[axis]:
            self.notes.stack(i)
        rest = self.original[:axis] + self.original[axis + 1 :]
        return {"value": jnp.moveaxis(self.value, axis, 0)}, lambda one: dataclasses.replace(self, original=rest, **one)

    def permuted(self, permutation: tuple[int, ...]) -> Observed:
        """Returns the value with its axes in another order."""
        original = tuple(self.original[i] for i in permutation)
        return dataclasses.replace(self, value=jnp.transpose(self.value, permutation), original=original)

    def reshape(self, shape: tuple[int, ...]) -> Observed | None:
        """Returns the value reshaped, with the leaf's axes that each new axis is made of."""
        groups = reshape_groups(self.shape, shape) if self.whole else None
        if groups is None:
            return None
        original: list[tuple[int, ...]] = [()] * len(shape)
        for old, new in groups:
            merged = tuple(dict.fromkeys(i for axis in old for i in self.original[axis]))
            for axis in new:  # a new axis of size one, as of a stack to be, is none of the leaf's
                original[axis] = merged if shape[axis] > 1 or len(new) == 1 else ()
        return dataclasses.replace(self, value=self.value.reshape(shape), original=tuple(original))

    def derived(self, function: Callable[[jax.Array], jax.Array]) -> Observed:
        """Returns the value after an operation on shapes that does not keep axes apart."""
        value = function(self.value)
        return dataclasses.replace(self, value=value, original=((),) * value.ndim, whole=False)
