"""Gradients and updates without, or within, given subspaces.

Gradient Projection Memory for Continual Learning (Saha, Garg, Roy, 2021) is the best known use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import Role, StructureError
from subspace_jax.linalg import Mode, project
from subspace_jax.optim._matrices import Matrices, by_path, check_paths, map_matrices

Place = Literal["in", "out", "both"]

# What a projection leaves of a gradient inside the removed subspace is rounding of about this size.
ROUNDING = 32 * float(jnp.finfo(jnp.float32).eps)


class ProjectState(NamedTuple):
    """State of `project_orthogonal`.

    Attributes:
      basis: bases by path, each `[*stack, d, k]` or, for both sides, a pair; see `replace_basis`.
    """

    basis: dict[str, Any]


def project_orthogonal(
    basis: Any,
    mode: Mode = "remove",
    side: Place = "in",
    *,
    rtol: float | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes a subspace from what passes, or keeps that alone.

    \(G \mapsto G - U U^T G\) for side "in", so that for inputs in the span of \(U\) a linear layer's outputs do not
    change; \(G - G U U^T\) for "out"; both one after the other for "both". With `mode="keep"` what would be removed
    stays. In front of an optimiser it projects the gradient, behind it the update.

    **Before, after or both.** For anything linear in the gradient (SGD, momentum, accumulation, clipping by the global
    norm, schedules) the places are one. Adam scales every entry on its own and does not commute with the projection:

    - before Adam: the moments hold nothing of the removed directions, but the update does: on a 12 x 7 kernel with
      three random directions removed, about a seventh of the accumulated update of 50 steps lies in them (none where
      the directions are coordinate axes). The update need not descend either.
    - after Adam: \(U^T u = 0\) to rounding, whatever came earlier in the chain, weight decay included; the moments are
      those of the whole gradient, and the update need not descend.
    - both, which is `sandwich`: \(U^T u = 0\), and without momentum \(\langle g, u \rangle \ge 0\).

    Args:
      basis: \(U\) by path, or a tree with holes: `[*stack, d, k]` with orthonormal columns, zero columns beyond its
        rank; a pair `(of inputs, of outputs)` for side "both". Leaves without one pass as they are. Of a stand-in
        weight's factors the side's own is projected: `a` for "in", `b` for "out".
      mode: "remove", or "keep".
      side: which axis the subspaces lie in.
      rtol: a matrix of which less than this share is left becomes zero: that is rounding, which Adam would blow up to
        full size. \(32\,\epsilon\) of float32 if None.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes. `update` takes `basis=` to override the state's for one
      step.

    Raises:
      PatternError: at `init`, a basis is for no leaf.
      StructureError: a basis does not fit its array, or is not in float32.
      RoleError: an array is not known to be a matrix.

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
    if mode not in ("remove", "keep") or side not in ("in", "out", "both"):
        raise ValueError(
            f'project_orthogonal: mode={mode!r} is "remove" or "keep", side={side!r} "in", "out" or "both".'
        )
    given = _pairs(basis) if side == "both" else by_path(basis)
    tolerance = ROUNDING if rtol is None else rtol

    def init(params: Any) -> ProjectState:
        check_paths(given, params, "basis")
        map_matrices(lambda matrix, view: _check(matrix, view, given[view.path], side), params, roles, given)
        return ProjectState(dict(given))

    def update(
        updates: Any, state: ProjectState, params: Any = None, *, basis: Any = None, **extra: Any
    ) -> tuple[Any, ProjectState]:
        del params, extra
        bases = state.basis if basis is None else (_pairs(basis) if side == "both" else by_path(basis))
        bases = jax.lax.stop_gradient(bases)

        def one(matrix: jax.Array, view: Matrices) -> jax.Array:
            return _without_rounding(_projected(matrix, view, bases[view.path], mode, side), matrix, tolerance)

        return map_matrices(one, updates, roles, bases), state

    return optax.GradientTransformationExtraArgs(init, update)


def _pairs(basis: Any) -> dict[str, Any]:
    """Pairs of bases by path, of a dict by path or of nested dicts."""
    found: dict[str, Any] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(basis, is_leaf=lambda v: isinstance(v, tuple)):
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = value
    return found


def _projected(matrix: jax.Array, view: Matrices, basis: Any, mode: Mode, side: Place) -> jax.Array:
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    bases = {"in": basis[0], "out": basis[1]} if side == "both" else {side: basis}
    for name in view.sides:
        if name in bases:
            columns = bases[name]
            wide = project(wide, columns, mode=mode, side=name)  # pyright: ignore[reportArgumentType]
            if 2 * columns.shape[-1] > columns.shape[-2]:  # a large basis leaves rounding of its own
                wide = project(wide, columns, mode=mode, side=name)  # pyright: ignore[reportArgumentType]
    return wide


def _without_rounding(projected: jax.Array, matrix: jax.Array, tolerance: float) -> jax.Array:
    """Zero where what is left of a matrix is no more than rounding."""
    left, whole = (jnp.sum(jnp.square(v.astype(projected.dtype)), (-2, -1), keepdims=True) for v in (projected, matrix))
    return jnp.where(left <= tolerance**2 * whole, 0.0, projected)


def _check(matrix: jax.Array, view: Matrices, basis: Any, side: Place) -> jax.Array:
    """Refuses a basis that does not fit the matrices of its leaf."""
    bases = {"in": basis[0], "out": basis[1]} if side == "both" else {side: basis}
    for name, columns in bases.items():
        size = matrix.shape[-2 if name == "in" else -1]
        if name not in view.sides:
            continue
        expected = f"[*{matrix.shape[:-2]}, {size}, k] in float32"
        if columns.dtype not in (jnp.float32, jnp.float64):
            raise StructureError(f"{view.path}: the basis is {columns.dtype}; expected {expected}.")
        if columns.shape[-2] != size or columns.shape[:-2] not in ((), matrix.shape[:-2]):
            raise StructureError(
                f"{view.path}: the basis of side {name!r} has shape {columns.shape}; expected {expected} for matrices "
                f"{matrix.shape}. Is it of the other side?"
            )
        if columns.shape[-1] > size:
            raise StructureError(
                f"{view.path}: {columns.shape[-1]} columns in {size} dimensions cannot be orthonormal; expected at "
                f"most {size}."
            )
        _check_orthonormal(view.path, columns)
    return matrix


def _check_orthonormal(path: str, columns: jax.Array) -> None:
    """Refuses columns that are neither orthonormal nor zero, where their values are known."""
    if isinstance(columns, jax.core.Tracer):
        return
    gram = jnp.swapaxes(columns, -1, -2) @ columns
    live = jnp.diagonal(gram, axis1=-2, axis2=-1) > 0.5
    error = float(jnp.max(jnp.abs(gram - jnp.eye(columns.shape[-1]) * live[..., None, :]), initial=0.0))
    if not error < 1e-3:
        raise StructureError(
            f"{path}: the basis is off orthonormal columns by {error:.2g}; expected columns of length one, or zero, at "
            "right angles. sj.linalg.orthonormalize makes them."
        )


def sandwich(inner: optax.GradientTransformation, basis: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    r"""Projects the gradient before and the update after an optimiser: the place to choose for adaptive ones.

    The update has nothing of the removed directions, and without momentum
    \(\langle g, u \rangle = (P g)^T D (P g) \ge 0\).

    Args:
      inner: the optimiser; weight decay inside it is projected too.
      basis: as for `project_orthogonal`.
      options: of `project_orthogonal`.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = sj.sandwich(optax.adamw(1e-3), {"w": jnp.eye(3)[:, :1]})
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, _ = optimizer.update({"w": jnp.ones((3, 2))}, optimizer.init(params), params)
      >>> updates["w"][0].tolist()
      [0.0, 0.0]
    """
    projection = project_orthogonal(basis, **options)
    return optax.chain(projection, inner, projection)


def replace_basis(state: Any, basis: Any) -> Any:
    """Returns an optimiser state with new bases in every `project_orthogonal` of it; nothing compiles again.

    Args:
      state: of a chain, `multi_transform`, `MultiSteps` or the like.
      basis: bases by path of the old ones' shapes.

    Raises:
      StructureError: a path or shape is not that of the state's, or the state has no projection.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = optax.chain(sj.project_orthogonal({"w": jnp.zeros((3, 1))}), optax.sgd(1.0))
      >>> state = optimizer.init({"w": jnp.ones((3, 2))})
      >>> sj.replace_basis(state, {"w": jnp.eye(3)[:, 2:]})[0].basis["w"].tolist()
      [[0.0], [0.0], [1.0]]
    """
    count = 0

    def one(node: Any) -> Any:
        nonlocal count
        if not isinstance(node, ProjectState):
            return node
        count += 1
        new = _pairs(basis) if any(isinstance(v, tuple) for v in node.basis.values()) else by_path(basis)
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
        return ProjectState(new)

    replaced = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, ProjectState))
    if not count:
        raise StructureError("replace_basis: the optimiser state holds no project_orthogonal.")
    return replaced


FIRST_MOMENTS = ("mu", "trace", "momentum", "m")


def project_momentum(
    state: Any, basis: Any, mode: Mode = "remove", side: Place = "in", *, roles: Mapping[str, Role] | None = None
) -> Any:
    """Returns an optimiser state whose first moments are projected, to be called when the basis changes.

    Second moments are scales, not directions, and stay.

    Args:
      state: any optax state; fields called `mu`, `trace` or `momentum` are first moments.
      basis: as for `project_orthogonal`.
      mode: as for `project_orthogonal`.
      side: as for `project_orthogonal`.
      roles: as for `project_orthogonal`.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> state = optax.trace(0.9).init({"w": jnp.ones((3, 2))})._replace(trace={"w": jnp.ones((3, 2))})
      >>> sj.project_momentum(state, {"w": jnp.eye(3)[:, :1]}).trace["w"].tolist()
      [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """
    projection = project_orthogonal(basis, mode, side, roles=roles)

    def moments(tree: Any) -> Any:
        bases = projection.init(tree)
        return projection.update(tree, bases)[0]

    return _map_moments(state, moments)


def reset_moments(state: Any) -> Any:
    """Returns an optimiser state with first and second moments at zero; counts and everything else stay.

    Args:
      state: any optax state; moments are the fields called `mu`, `trace`, `momentum`, and `nu`.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> state = optax.scale_by_adam().init({"w": jnp.ones(2)})
      >>> sj.reset_moments(state._replace(nu={"w": jnp.ones(2)})).nu["w"].tolist()
      [0.0, 0.0]
    """
    return _map_moments(state, lambda tree: jax.tree.map(jnp.zeros_like, tree), (*FIRST_MOMENTS, "nu", "v"))


def _map_moments(state: Any, function: Callable[[Any], Any], names: tuple[str, ...] = FIRST_MOMENTS) -> Any:
    """Maps the trees in the fields of these names of every named tuple or dataclass in a state."""

    def has_names(value: Any) -> bool:
        return any(hasattr(value, n) for n in names) and hasattr(value, "_fields")

    def one(node: Any) -> Any:
        if not has_names(node):
            return node
        fields = {}
        for name in node._fields:
            value = getattr(node, name)
            fields[name] = function(value) if name in names else _map_moments(value, function, names)
        return type(node)(**fields)

    return jax.tree.map(one, state, is_leaf=has_names)
