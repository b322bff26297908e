"""Finds how a model uses each of its parameters, by tracing it once with leaves that record their uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from subspace_jax.core._apply import with_adapters
from subspace_jax.core._errors import PatternError, nearest
from subspace_jax.core._observed import Notes, Observed
from subspace_jax.core._paths import leaves_with_paths, map_with_paths, matches
from subspace_jax.core._role import Role
from subspace_jax.core._types import Params
from subspace_jax.core._weight import is_weight


def roles(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    stack: Mapping[str, int | tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> dict[str, Role]:
    """Finds how `fn(params, *args, **kwargs)` uses each leaf of `params`: the axes it stacks, contracts and produces.

    The function is traced once, abstractly: nothing is computed and nothing allocated, and arguments may be
    `jax.ShapeDtypeStruct`s.

    Args:
      fn: a function of parameters, such as `lambda p, x: model.apply({"params": p}, x)`.
      params: any tree of arrays.
      *args: the function's other arguments; flags and strings stay what they are.
      stack: axes that run over whole layers or experts, by glob, where a program cannot tell them from features: in
        `einsum("nd,edf->nef", x, w)` it is for you to say that `{"**/experts/*": 0}` are experts of their own.
      **kwargs: likewise.

    Returns:
      A dict from path to `Role`; arrays that a weight stores come last. A kernel that is sliced, scaled, masked or
      otherwise computed with before its product has the role of that product.

    Raises:
      PatternError: a glob of `stack` matches no leaf, or names an axis that the leaf has not.

    Example:
      >>> import jax.numpy as jnp
      >>> p = {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
      >>> found = roles(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["kernel"]) + p["bias"], p, jnp.ones((5, 4)))
      >>> found["kernel"].in_axes, found["kernel"].out_axes, found["bias"].kind
      ((0,), (1, 2), 'bias')
    """
    notes: dict[str, Notes] = {}
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
            return Observed.of(leaf, notes.setdefault(path, Notes()))

        results = with_adapters(fn, custom_rules="inline")(map_with_paths(observe, params), *args, **kwargs)
        return [r for r in jax.tree.leaves(results) if _is_traceable(r)]

    jax.eval_shape(run, *(arrays[i] for i in traced))
    found = {
        path: (notes[path].role(leaf.ndim), leaf.ndim) for path, leaf in leaves_with_paths(params) if path in notes
    }
    _check_stack(stack or {}, {path: ndim for path, (_, ndim) in found.items()})
    known = {path: leaf.role for path, leaf in leaves_with_paths(params) if is_weight(leaf) and leaf.stored}
    return {path: _stacked(role, path, stack or {}) for path, (role, _) in found.items()} | known


def _check_stack(stack: Mapping[str, int | tuple[int, ...]], sizes: Mapping[str, int]) -> None:
    for pattern, axes in stack.items():
        hit = [path for path in sizes if matches(pattern, path)]
        if not hit:
            raise PatternError(
                f"roles: stack={{{pattern!r}: ...}} matches no leaf; nearest are {nearest(pattern, sizes)}."
            )
        for path in hit:
            if any(not 0 <= i < sizes[path] for i in ((axes,) if isinstance(axes, int) else axes)):
                raise PatternError(f"{path}: stack={axes} names an axis that this leaf of {sizes[path]} axes has not.")


def _stacked(role: Role, path: str, stack: Mapping[str, int | tuple[int, ...]]) -> Role:
    """The role with the axes over layers or experts that the caller names."""
    named = next((axes for pattern, axes in stack.items() if matches(pattern, path)), ())
    axes = (named,) if isinstance(named, int) else tuple(named)
    if not axes:
        return role
    rest = ((i for i in part if i not in axes) for part in (role.in_axes, role.out_axes))
    before = tuple(i for i in role.stack_axes if i not in axes)
    in_axes, out_axes = map(tuple, rest)
    return dataclasses.replace(role, stack_axes=before + axes, in_axes=in_axes, out_axes=out_axes)


def _is_traceable(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
