"""Finds how a model uses each of its parameters, by tracing it once with leaves that record their uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core._apply import with_adapters
from subspace_jax.core._operation import Operation
from subspace_jax.core._operations import Convolution, Dot, Lookup
from subspace_jax.core._paths import leaves_with_paths, map_with_paths
from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._role import Role
from subspace_jax.core._types import Params
from subspace_jax.core._weight import Weight, is_weight, static

# Elementwise primitives by what they make of a leaf.
_ELEMENTWISE = {"add": "bias", "add_any": "bias", "sub": "bias", "mul": "scale", "div": "scale"}


class _Notes:
    """The recorded uses of one leaf; a place in the program that is traced twice counts once."""

    def __init__(self) -> None:
        self.uses: dict[tuple[int, ...], Role] = {}
        self.stack_axes: list[int] = []

    def stack(self, axis: int) -> None:
        if axis not in self.stack_axes:
            self.stack_axes.append(axis)

    def role(self, ndim: int) -> Role:
        """The role that fits the uses; a lookup outweighs a tied output, the first product every later one."""
        found = list(self.uses.values())
        if not found:
            return Role("unused", tuple(self.stack_axes), uses=0)
        order = ("embedding", "conv", "dense", "scale", "bias", "other")
        main = min(found, key=lambda r: order.index(r.kind))
        outer = tuple(self.stack_axes)
        inner = tuple(a for a in main.stack_axes if a not in outer)
        return dataclasses.replace(main, stack_axes=outer + inner, uses=len(found))


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Observed(Weight):
    """A leaf that records its uses and otherwise behaves as the array.

    Attributes:
      value: the array.
      notes: where uses are written.
      original: axis `i` of the value is axis `original[i]` of the leaf.
      whole: False once the value has been reshaped, so that its axes are no longer the leaf's.
    """

    value: jax.Array
    notes: _Notes = static()
    original: tuple[int, ...] = static()
    whole: bool = static(default=True)

    axes: ClassVar[Mapping[str, str]] = {"value": "array"}

    @classmethod
    def of(cls, array: Any, notes: _Notes) -> _Observed:
        axes = tuple(range(array.ndim))
        return cls(
            value=array,
            notes=notes,
            original=axes,
            role=Role("other"),
            dtype=array.dtype,
            trainable=("value",),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        return self.value if dtype is None else self.value.astype(dtype)

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array:
        kind = _ELEMENTWISE.get(primitive, "other")
        self.notes.uses[path] = Role(kind)  # pyright: ignore[reportArgumentType]
        return self.value

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        self.notes.uses[operation.path] = self._role_in(operation)
        return operation.apply(x, self.value)

    def _role_in(self, operation: Operation) -> Role:
        if not self.whole:
            return Role("other")
        batch = operation.batch_labels if isinstance(operation, Dot) else ()
        kinds = {Dot: "dense", Convolution: "conv", Lookup: "embedding"}
        groups = operation.parameters["feature_group_count"] if isinstance(operation, Convolution) else 1

        def axes(test: Callable[[str], bool]) -> tuple[int, ...]:
            return tuple(self.original[i] for i, n in enumerate(operation.weight_labels) if test(n))

        return Role(
            kinds[type(operation)],  # pyright: ignore[reportArgumentType]
            axes(lambda n: n in batch),
            axes(lambda n: n in operation.in_labels),
            axes(lambda n: n not in batch and n not in operation.in_labels),
            groups,
        )

    def can_split(self, axis: int, *, loop: bool) -> bool:
        return self.whole and (loop or (axis == 0 and self.ndim > 1))

    def map_stacked(self, axis: int, function: Callable[[jax.Array, int], jax.Array]) -> _Observed:
        return dataclasses.replace(self, value=function(self.value, axis))

    def split_stack(self, axis: int) -> tuple[dict[str, Any], Callable[[dict[str, Any]], _Observed]]:
        self.notes.stack(self.original[axis])
        rest = self.original[:axis] + self.original[axis + 1 :]
        return {"value": jnp.moveaxis(self.value, axis, 0)}, lambda one: dataclasses.replace(self, original=rest, **one)

    def reshape(self, shape: tuple[int, ...]) -> None:
        return None

    def derived(self, function: Callable[[jax.Array], jax.Array]) -> _Observed:
        value = function(self.value)
        return dataclasses.replace(self, value=value, original=tuple(range(value.ndim)), whole=False)


def roles(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> dict[str, Role]:
    """Finds how `fn(params, *args, **kwargs)` uses each leaf of `params`: the axes it stacks, contracts and produces.

    The function is traced once, abstractly: nothing is computed and nothing allocated, and arguments may be
    `jax.ShapeDtypeStruct`s.

    Args:
      fn: a function of parameters, such as `lambda p, x: model.apply({"params": p}, x)`.
      params: any tree of arrays.
      *args: the function's other arguments; flags and strings stay what they are.
      **kwargs: likewise.

    Returns:
      A dict from path to `Role`, in the order of the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> p = {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
      >>> found = roles(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["kernel"]) + p["bias"], p, jnp.ones((5, 4)))
      >>> found["kernel"].in_axes, found["kernel"].out_axes, found["bias"].kind
      ((0,), (1, 2), 'bias')
    """
    notes: dict[str, _Notes] = {}
    arrays, treedef = jax.tree.flatten((params, args, kwargs), is_leaf=is_weight)
    traced = [i for i, v in enumerate(arrays) if _is_traceable(v)]

    def run(*values: Any) -> Any:
        filled = list(arrays)
        for i, value in zip(traced, values, strict=True):
            filled[i] = value
        params, args, kwargs = jax.tree.unflatten(treedef, filled)

        def observe(path: str, leaf: Any) -> Any:
            if is_weight(leaf) or not hasattr(leaf, "dtype"):
                return leaf
            return _Observed.of(leaf, notes.setdefault(path, _Notes()))

        results = with_adapters(fn)(map_with_paths(observe, params), *args, **kwargs)
        return [r for r in jax.tree.leaves(results) if _is_traceable(r)]

    jax.eval_shape(run, *(arrays[i] for i in traced))
    return {path: notes[path].role(leaf.ndim) for path, leaf in leaves_with_paths(params) if path in notes}


def _is_traceable(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
