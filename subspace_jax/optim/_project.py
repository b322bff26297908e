"""Projects gradients and updates onto given subspaces or their complements.

Gradient Projection Memory for Continual Learning (Saha, Garg, Roy, 2021) is the best known use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Role, StructureError, Updates, check_choice
from subspace_jax.linalg import Mode, project
from subspace_jax.optim._bases import Side, bases_by_path, check_bases, check_orthonormal, of_sides
from subspace_jax.optim._holes import rest_without_gradient
from subspace_jax.optim._matrix_views import MatrixView, map_matrices
from subspace_jax.optim._rounding import ROUNDING, without_rounding


class ProjectState(NamedTuple):
    """State of `project_orthogonal`.

    Attributes:
      basis: bases by path, each `[*stack, d, k]` or, for both sides, a pair; see `replace_basis`.
    """

    basis: dict[str, Any]


def project_orthogonal(
    basis: Any,
    mode: Mode = "remove",
    side: Side = "in",
    *,
    rtol: float | None = None,
    renorm: Literal["rms"] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects updates onto a subspace or its complement.

    \(G \mapsto G - U U^T G\) for side "in", so that for inputs in the span of \(U\) a linear layer's outputs do not
    change; \(G - G U U^T\) for "out"; both one after the other for "both". With `mode="keep"` what would be removed
    stays. Before an optimizer it projects the gradient, after it the update.

    **Before, after or both.** For anything linear in the gradient (SGD, momentum, accumulation, schedules) the places
    are one; clipping by the global norm gives one direction, but what comes first decides the norm. Adam scales every
    entry on its own, as signs, elementwise clipping and other roots of squares do, and does not commute with the
    projection:

    - before Adam: the moments are orthogonal to the removed directions, but the update is not: on a 12 x 7 kernel with
      three random directions removed, about a seventh of the accumulated update of 50 steps lies in them (none where
      the directions are coordinate axes). The update need not descend either.
    - after Adam: \(U^T u = 0\) to rounding, whatever came earlier in the chain, weight decay included; the moments are
      those of the whole gradient, and the update need not descend.
    - both, which is `sandwich`: \(U^T u = 0\), and without momentum \(\langle g, u \rangle \ge 0\).

    Other ways back into the subspace: weight decay that is chained after the last projection, and parameters in
    bfloat16, which are rounded by up to \(2^{-9}\) of their size at every step; keep a float32 copy where that matters.

    Args:
      basis: \(U\) by path, or a tree with holes: `[*stack, d, k]` with orthonormal columns, zero columns beyond its
        rank; a pair `(of inputs, of outputs)` for side "both". Leaves without one pass as they are. Of a stand-in
        weight's factors the side's own is projected: `a` for "in", `b` for "out".
      mode: "remove", or "keep".
      side: which axis the subspaces lie in.
      rtol: a matrix of which less than this share is left becomes zero: that is rounding, which Adam would amplify to
        full size. \(32\,\epsilon\) of float32 if None.
      renorm: "rms" gives what is left of each matrix the norm that the whole had. A projection shortens; by default
        it may.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes. `update` takes `basis=` to override the state's for one
      step.

    Raises:
      PatternError: at `init` or `update`, a basis is for no leaf.
      StructureError: a basis does not fit its array, or is not in float32 at least; at `init`, it has columns that are
        neither orthonormal nor zero.
      RoleError: an array is not known to be a matrix.
      ValueError: `mode`, `side` or `renorm` is unknown.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> params = {"w": jnp.zeros((3, 2))}
      >>> optimizer = optax.chain(sj.project_orthogonal({"w": jnp.eye(3)[:, :1]}), optax.sgd(1.0))
      >>> updates, _ = optimizer.update({"w": jnp.ones((3, 2))}, optimizer.init(params))
      >>> abs(updates["w"]).tolist()
      [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]

    References:
      Saha, Garg, Roy, Gradient Projection Memory for Continual Learning, 2021.
    """
    check_choice("project_orthogonal: mode", mode, ("remove", "keep"))
    check_choice("project_orthogonal: side", side, ("in", "out", "both"))
    check_choice("project_orthogonal: renorm", renorm, (None, "rms"))
    given = bases_by_path(basis, side)

    def init(params: Params) -> ProjectState:
        check_bases(given, params, side, roles)
        check_orthonormal(given, side)
        return ProjectState(_copied(given))

    def update(
        updates: Updates, state: OptState, params: Params = None, *, basis: Any = None, **extra: Any
    ) -> tuple[Updates, ProjectState]:
        del params, extra
        bases = state.basis if basis is None else bases_by_path(basis, side)
        seen = check_bases(bases, updates, side, roles, gradients=True)
        return _project_tree(updates, bases, seen, side, mode, rtol, renorm), state

    return optax.GradientTransformationExtraArgs(init, update)


def _project_tree(
    updates: Updates,
    bases: Mapping[str, Any],
    seen: Sequence[MatrixView | None],
    side: Side,
    mode: Mode,
    rtol: float | None,
    renorm: Any,
) -> Updates:
    """A tree whose matrices with a basis are projected; `seen` are its matrix views."""
    bases = jax.lax.stop_gradient(bases)

    def projected(matrix: jax.Array, view: MatrixView) -> jax.Array:
        return _projected(matrix, view, of_sides(bases[view.path], side), mode)

    return map_projected(projected, updates, bases, seen, rtol, renorm)


def map_projected(
    function: Callable[[jax.Array, MatrixView], jax.Array],
    updates: Updates,
    paths: Any,
    seen: Sequence[MatrixView | None],
    rtol: float | None = None,
    renorm: Any = None,
) -> Updates:
    """Maps a projection over the matrices of some paths, and sets those to zero of which rounding is left.

    Args:
      function: gets `[*stack, in, out]` and its view, and returns its projection in at least float32.
      updates: a tree.
      paths: a container of the paths to map.
      seen: the tree's `matrix_views`.
      rtol: a matrix of which less than this share is left becomes zero; \\(32\\,\\epsilon\\) of float32 if None.
      renorm: "rms" gives what is left of each matrix the norm that the whole had.
    """

    def one(matrix: jax.Array, view: MatrixView) -> jax.Array:
        tolerance = ROUNDING if rtol is None else rtol
        return without_rounding(function(matrix, view), matrix, tolerance, renorm=renorm is not None)

    return map_matrices(one, updates, None, paths, seen=seen)


def _copied(bases: Mapping[str, Any]) -> dict[str, Any]:
    """Bases of the state's own: a training step that donates its state must not free the caller's."""
    return jax.tree.map(jnp.copy, dict(bases))


def _projected(matrix: jax.Array, view: MatrixView, bases: Mapping[str, jax.Array], mode: Mode) -> jax.Array:
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    for side in view.sides:
        if side in bases:
            columns = bases[side]
            times = 2 if 2 * columns.shape[-1] > columns.shape[-2] else 1  # a large basis leaves rounding of its own
            for _ in range(times):
                wide = project(wide, columns, mode=mode, side=side)  # pyright: ignore[reportArgumentType]
    return wide


class SandwichState(NamedTuple):
    """State of `sandwich`.

    Attributes:
      projection: the bases, of both projections.
      inner: state of the optimizer between them.
    """

    projection: ProjectState
    inner: Any


def sandwich(
    inner: optax.GradientTransformation,
    basis: Any,
    mode: Mode = "remove",
    side: Side = "in",
    *,
    rtol: float | None = None,
    renorm: Literal["rms"] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the gradient before and the update after an optimizer, as adaptive optimizers need.

    The update has no component along the removed directions, and without momentum
    \(\langle g, u \rangle = (P g)^T D (P g) \ge 0\) for the step \(-u\).

    Args:
      inner: the optimizer; weight decay inside it is projected too.
      basis: orthonormal columns by path, `[*stack, d, k]`, or a tree with holes; a pair of them for side "both".
      mode: "remove" the subspaces, or "keep" them alone.
      side: which axis the subspaces lie in: "in", "out" or "both".
      rtol: a matrix of which less than this share is left becomes zero; \(32\,\epsilon\) if None.
      renorm: "rms" gives what is left of each update the norm that the whole had.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes. `update` takes `basis=` to override the state's for one
      step.

    Raises:
      PatternError: at `init` or `update`, a basis is for no leaf.
      StructureError: a basis does not fit its array, or is not in float32 at least; at `init`, it has columns that are
        neither orthonormal nor zero.
      RoleError: an array is not known to be a matrix.
      ValueError: `mode`, `side` or `renorm` is unknown.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = sj.sandwich(optax.adamw(1e-3), {"w": jnp.eye(3)[:, :1]})
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, _ = optimizer.update({"w": jnp.ones((3, 2))}, optimizer.init(params), params)
      >>> updates["w"][0].tolist()
      [0.0, 0.0]
    """
    after = project_orthogonal(basis, mode, side, rtol=rtol, renorm=renorm, roles=roles)
    extended = rest_without_gradient(inner)

    def init(params: Params) -> SandwichState:
        first: Any = after.init(params)
        return SandwichState(first, extended.init(params))

    def update(
        updates: Updates, state: OptState, params: Params = None, *, basis: Any = None, **extra: Any
    ) -> tuple[Updates, SandwichState]:
        bases = state.projection.basis if basis is None else bases_by_path(basis, side)
        seen = check_bases(bases, updates, side, roles, gradients=True)
        projected = _project_tree(updates, bases, seen, side, mode, rtol, None)
        directions, held = extended.update(projected, state.inner, params, **extra)
        if jax.tree.structure(directions) != jax.tree.structure(updates):  # the views are of another tree
            seen = check_bases(bases, directions, side, roles, gradients=True)
        steps = _project_tree(directions, bases, seen, side, mode, rtol, renorm)
        return steps, SandwichState(state.projection, held)

    return optax.GradientTransformationExtraArgs(init, update)


def replace_basis(state: OptState, basis: Any) -> OptState:
    """Returns an optimizer state with new bases in every `project_orthogonal` of it; nothing compiles again.

    Args:
      state: of a chain, `multi_transform`, `MultiSteps` or the like.
      basis: bases by path of the old ones' shapes.

    Raises:
      StructureError: a path or shape is not that of the state's, or the state has no projection.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = optax.chain(sj.project_orthogonal({"w": jnp.zeros((3, 1))}), optax.sgd(1.0))
      >>> state = optimizer.init({"w": jnp.ones((3, 2))})
      >>> sj.optim.replace_basis(state, {"w": jnp.eye(3)[:, 2:]})[0].basis["w"].tolist()
      [[0.0], [0.0], [1.0]]
    """
    count = 0

    def one(node: Any) -> Any:
        nonlocal count
        if not isinstance(node, ProjectState):
            return node
        count += 1
        new = bases_by_path(basis, "both" if any(isinstance(v, tuple) for v in node.basis.values()) else "in")
        old_shapes, new_shapes = (
            {p: jax.tree.map(lambda v: (v.shape, v.dtype), found) for p, found in bases.items()}
            for bases in (node.basis, new)
        )
        if old_shapes != new_shapes:
            changed = sorted(p for p in {*old_shapes, *new_shapes} if old_shapes.get(p) != new_shapes.get(p))
            raise StructureError(
                f"{changed[0]}: the new basis is {new_shapes.get(changed[0])}, the state has "
                f"{old_shapes.get(changed[0])}. "
                "Shapes must stay, so that nothing compiles again: make room from the start, with zero columns."
            )
        return ProjectState(_copied(new))

    replaced = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, ProjectState))
    if not count:
        raise StructureError("replace_basis: the optimizer state holds no project_orthogonal.")
    return replaced
