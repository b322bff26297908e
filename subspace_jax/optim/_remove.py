"""Takes fixed subspaces out of gradients and updates by removers, which multiply least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Role, StructureError, Updates, check_choice
from subspace_jax.linalg import Remover
from subspace_jax.optim._bases import Side, of_sides
from subspace_jax.optim._holes import rest_without_gradient
from subspace_jax.optim._matrix_views import MatrixView, check_paths, matrix_views, refuse_unseen
from subspace_jax.optim._project import map_projected


class RemoveState(NamedTuple):
    """State of `remove_subspaces`.

    Attributes:
      removers: by path, a `Remover` each or, for both sides, a pair of them.
      inner: state of the optimizer.
    """

    removers: dict[str, Any]
    inner: Any


def remove_subspaces(
    inner: optax.GradientTransformation,
    removers: Mapping[str, Any],
    side: Side = "in",
    *,
    project_gradients: bool = True,
    rtol: float | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes subspaces from the update of an optimizer, and from its gradient, by the cheapest products.

    What `sandwich` does with bases in mode "remove", for subspaces that stay for many steps: `linalg.make_remover`
    holds each as \(U\), as \(I - U U^T\), or as nothing where there is nothing to remove, whichever multiplies least.
    Operations per matrix of \(d \times n\) and projection: \(4 d k n\), \(2 d^2 n\) or none.

    The removed directions of the parameters stay as they are with `project_gradients` and without. Without, the
    moments are those of the whole gradient, which makes steps smaller where earlier tasks' gradients are large, and a
    step need not descend; it costs half.

    Args:
      inner: the optimizer; weight decay inside it is projected too.
      removers: by path, from `linalg.make_remover`; a pair `(of inputs, of outputs)` for side "both". Of a stand-in
        weight's factors the side's own is projected: `a` for "in", `b` for "out".
      side: which axis the subspaces lie in: "in", "out" or "both".
      project_gradients: whether to project what the optimizer gets too, as `sandwich` does.
      rtol: a matrix of which less than this share is left becomes zero; \(32\,\epsilon\) of float32 if None.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes. Its state holds the removers, and any removers of the
      same forms may be put in their place without compiling again.

    Raises:
      PatternError: at `init` or `update`, a remover is for no leaf.
      StructureError: a remover does not fit its array.
      RoleError: an array is not known to be a matrix.
      ValueError: `side` is unknown.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> removers = {"w": sj.linalg.make_remover(jnp.eye(3)[:, :1])}
      >>> optimizer = sj.optim.remove_subspaces(optax.adamw(1e-3), removers)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, _ = optimizer.update({"w": jnp.ones((3, 2))}, optimizer.init(params), params)
      >>> updates["w"][0].tolist()
      [0.0, 0.0]
    """
    check_choice("remove_subspaces: side", side, ("in", "out", "both"))
    given = dict(removers)
    extended = rest_without_gradient(inner)

    def init(params: Params) -> RemoveState:
        _check(given, params, side, roles)
        return RemoveState(jax.tree.map(jnp.copy, given), extended.init(params))

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, RemoveState]:
        gradients = _removed(updates, state.removers, side, rtol, roles) if project_gradients else updates
        directions, held = extended.update(gradients, state.inner, params, **extra)
        return _removed(directions, state.removers, side, rtol, roles), RemoveState(state.removers, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _removed(
    updates: Updates, removers: Mapping[str, Any], side: Side, rtol: float | None, roles: Mapping[str, Role] | None
) -> Updates:
    """The updates without the subspaces; leaves with nothing to remove as they are."""
    seen = _check(removers, updates, side, roles, gradients=True)
    removers = jax.lax.stop_gradient(removers)
    used = {path: of_sides(found, side) for path, found in removers.items()}
    used = {path: found for path, found in used.items() if not all(one.is_empty for one in found.values())}

    def removed(matrix: jax.Array, view: MatrixView) -> jax.Array:
        for own in view.sides:
            if own in used[view.path]:
                matrix = used[view.path][own](matrix, own)
        return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))

    return map_projected(removed, updates, used, seen, rtol)


def _check(
    removers: Mapping[str, Any], tree: Any, side: Side, roles: Mapping[str, Role] | None, *, gradients: bool = False
) -> Sequence[MatrixView | None]:
    """The tree's `matrix_views`; refuses removers that do not fit its matrices, by shapes alone."""
    check_paths(removers, tree, "remover", gradients=gradients)
    seen = matrix_views(tree, roles)
    refuse_unseen(tree, seen, removers)
    for leaf, view in zip(jax.tree.leaves(tree), seen, strict=True):
        if view is None or view.path not in removers:
            continue
        shape = jax.eval_shape(view.unfold, leaf).shape
        for own, remover in _by_side(view.path, removers[view.path], side).items():
            if own not in view.sides:
                continue
            size = shape[-2 if own == "in" else -1]
            stacks = {v.shape[:-2] for v in (remover.basis, remover.projector) if v is not None}
            if remover.size != size or not stacks <= {(), shape[:-2]}:
                held = jax.tree.map(jnp.shape, (remover.basis, remover.projector))
                raise StructureError(
                    f"{view.path}: the remover of side {own!r} is of size {remover.size} with arrays {held}; expected "
                    f"size {size} for matrices {shape}. Is it of the other side?"
                )
    return seen


def _by_side(path: str, found: Any, side: Side) -> dict[str, Remover]:
    pair = isinstance(found, tuple) and len(found) == 2
    if pair != (side == "both") or not all(isinstance(v, Remover) for v in (found if pair else (found,))):
        raise StructureError(
            f"{path}: got a {type(found).__name__} for side {side!r}; expected "
            f"{'a pair of removers' if side == 'both' else 'a remover'}, from subspace_jax.linalg.make_remover."
        )
    return of_sides(found, side)
