"""Runs optimizers on manifolds: tangent gradients, retracted updates, transported moments.

Optimization Algorithms on Matrix Manifolds (Absil, Mahony, Sepulchre, 2008) has the scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.tree_util import tree_leaves_with_path

from subspace_jax.core import (
    Full,
    OptState,
    Params,
    PatternError,
    PyTree,
    StructureError,
    Updates,
    check_choice,
    check_int,
    is_weight,
    leaves_with_paths,
    matches,
    nearest,
    path_string,
    placed_like,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.manifolds import Manifold, Retraction
from subspace_jax.optim._holes import like_updates, rest_without_gradient
from subspace_jax.optim._moments import FIRST_MOMENTS, map_moments
from subspace_jax.optim._rounding import without_rounding

Transport = Literal["project", "isometric", "none"]


class RiemannianState(NamedTuple):
    """State of `riemannian`.

    Attributes:
      count: number of steps, an int32 scalar.
      inner: state of the inner optimizer; it knows only the leaves on manifolds.
    """

    count: jax.Array
    inner: Any


def riemannian(
    manifold: Manifold | Mapping[str, Manifold],
    inner: optax.GradientTransformation,
    *,
    retraction: Retraction = "exponential",
    transport: Transport = "project",
    renormalize_every: int = 5,
    tolerance: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps parameters on a manifold, whatever the inner optimizer does.

    The gradient is projected onto the tangent space at \(X\), the inner optimizer makes a direction of it, which is
    projected again to a tangent vector \(V\), and the update is \(\mathrm{retract}(X, V) - X\), so that
    `optax.apply_updates` lands on the manifold. It has to be the last for its leaves: scaling, clipping or decay after
    it leaves the manifold. Anything may come earlier in a chain, clipping by the global norm for one.

    First moments (momentum, Adam's `mu`) are vectors at \(X\); with the parameters they move to the new point. Second
    moments are scales and stay, so that Adam depends on the basis of a subspace, as in the plane it depends on axes.

    Args:
      manifold: of all leaves, or by path or glob; leaves without one pass as they are.
      inner: any optimizer with its learning rate, of the leaves on manifolds alone. Weight decay in it has no effect
        on a subspace or a rotation, since the projection takes it out.
      retraction: "exponential", along the geodesic; "qr" or "polar", the orthonormal factor of \(X + V\).
      transport: "project" projects first moments onto the new tangent space; "isometric" carries them by the
        manifold's `transport`; "none" gives the inner optimizer the gradient as it is and leaves its moments alone, so
        that only the direction is projected.
      renormalize_every: with "exponential", steps from one QR factorization against rounding to the next; it keeps
        signs of columns. Other retractions need none.
      tolerance: largest error of a point that `init` accepts, where it sees concrete arrays.

    Returns:
      A transformation whose `update` needs `params`. Structure and shapes are kept, and dtypes but for a narrower
      gradient's: an update on a manifold has the dtype of its point. With `optax.inject_hyperparams` name `inner`,
      `manifold` and `renormalize_every` in `static_args`.

    Raises:
      ValueError: an unknown option, or `update` without parameters.
      PatternError: a path or glob matches nothing.
      StructureError: at `init` or `update`, a leaf has a shape or dtype that no point has; at `init`, it is off the
        manifold.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> params = {"turn": jnp.eye(3), "scale": jnp.ones(())}
      >>> optimizer = sj.riemannian({"turn": sj.manifolds.SpecialOrthogonal()}, optax.adam(0.1))
      >>> gradient = {"turn": jnp.arange(9.0).reshape(3, 3), "scale": jnp.ones(())}
      >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
      >>> sj.manifolds.SpecialOrthogonal().check_point(optax.apply_updates(params, updates)["turn"])
      True

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008.
    """
    _check_options(retraction, transport, renormalize_every)

    def mask(tree: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(tree), [m is not None for _, m in _places(tree, manifold)])

    masked = rest_without_gradient(optax.masked(inner, mask))

    def init(params: Params) -> RiemannianState:
        _check_patterns(manifold, params)
        for (path, space), leaf in zip(_places(params, manifold), jax.tree.leaves(params), strict=True):
            if space is not None:
                _check_leaf(path, space, leaf)
                _check_on_manifold(path, space, leaf, tolerance)
        return RiemannianState(jnp.zeros([], jnp.int32), masked.init(params))

    def update(
        updates: Updates, state: OptState, params: Params = None, **extra: Any
    ) -> tuple[Updates, RiemannianState]:
        if params is None:
            raise ValueError("riemannian: update needs params; call optimizer.update(gradients, state, params).")
        count = jnp.asarray(optax.safe_increment(state.count))
        points = _points(like_updates(updates, params), manifold)
        if transport != "none":
            updates = _map_points(_tangent, updates, points)
        directions, held = masked.update(updates, state.inner, params, **extra)
        moved: dict[str, jax.Array] = {}

        def step(point: jax.Array, space: Manifold, direction: jax.Array, path: str) -> jax.Array:
            new = space.retract(point, _tangent(point, space, direction), retraction)
            if retraction == "exponential":
                new = _renormalized(new, space, count % renormalize_every == 0, renormalize_every == 1)
            moved[path] = new
            return placed_like(new.astype(point.dtype), point) - point

        found = _map_points(step, directions, points, with_path=True)
        return found, RiemannianState(count, _transported(held, points, moved, transport))

    return optax.GradientTransformationExtraArgs(init, update)


def _tangent(point: jax.Array, space: Manifold, vector: jax.Array, path: str = "") -> jax.Array:
    """The tangent part of a vector at a point, in the point's dtype; zero where that is rounding alone."""
    del path
    return without_rounding(space.to_tangent(point, vector), vector).astype(point.dtype)


def _names(tree: PyTree) -> list[str]:
    """A path for each of `jax.tree.leaves(tree)`; fields of stand-in weights have the weight's path before theirs."""
    found: list[str] = []
    for path, leaf in leaves_with_paths(tree):
        if is_weight(leaf) and not isinstance(leaf, Full):
            fields = (jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in tree_leaves_with_path(leaf))
            found.extend(f"{path}/{field}" for field in fields)
        else:
            found.extend(path for _ in jax.tree.leaves(leaf))
    return found


def _places(tree: PyTree, manifold: Manifold | Mapping[str, Manifold]) -> list[tuple[str, Manifold | None]]:
    """Path and manifold of every leaf; the first pattern that fits counts."""
    if isinstance(manifold, Manifold):
        return [(path, manifold) for path in _names(tree)]
    return [
        (path, next((space for pattern, space in manifold.items() if _fits(pattern, path)), None))
        for path in _names(tree)
    ]


def _fits(pattern: str, path: str) -> bool:
    return pattern == path or matches(pattern, path)


def _points(params: Params, manifold: Manifold | Mapping[str, Manifold]) -> dict[str, tuple[jax.Array, Manifold]]:
    found = {}
    for (path, space), leaf in zip(_places(params, manifold), jax.tree.leaves(params), strict=True):
        if space is not None:
            _check_leaf(path, space, leaf)
            found[path] = leaf, space
    return found


def _map_points(
    function: Callable[..., jax.Array],
    tree: PyTree,
    points: Mapping[str, tuple[jax.Array, Manifold]],
    *,
    with_path: bool = False,
) -> PyTree:
    """Maps `function(point, manifold, leaf)` over the leaves that have a point; others stay.

    What it returns is in the point's dtype: a step in a gradient's narrower one would leave the manifold.
    """
    leaves, treedef = jax.tree.flatten(tree)
    mapped = []
    for path, leaf in zip(_names(tree), leaves, strict=True):
        if path in points:
            new = function(*points[path], leaf, *([path] if with_path else []))
            mapped.append(placed_like(new, leaf))
        else:
            mapped.append(leaf)
    return jax.tree.unflatten(treedef, mapped)


def _renormalized(point: jax.Array, space: Manifold, due: jax.Array, always: bool) -> jax.Array:
    def frame() -> jax.Array:
        return space.retract(point, jnp.zeros_like(point), "qr")

    return frame() if always else lax.cond(due, frame, lambda: point)


def _transported(
    held: OptState,
    points: Mapping[str, tuple[jax.Array, Manifold]],
    moved: Mapping[str, jax.Array],
    transport: Transport,
) -> OptState:
    """An inner state whose first moments are vectors at the new points."""
    if transport == "none":
        return held

    def one(point: jax.Array, space: Manifold, vector: jax.Array, path: str) -> jax.Array:
        if transport == "project":
            found = without_rounding(space.to_tangent(moved[path], vector), vector)
        else:
            found = space.transport(point, vector, moved[path])
        return found.astype(vector.dtype)

    def moments(tree: PyTree) -> PyTree:
        return _map_points(one, tree, points, with_path=True)

    return map_moments(held, dict.fromkeys(FIRST_MOMENTS, moments))


def _check_leaf(path: str, space: Manifold, leaf: Any) -> None:
    if leaf.dtype != wide_dtype(leaf.dtype):
        raise StructureError(
            f"{path}: dtype {leaf.dtype} cannot hold a point of {space.name}, nor a step on it; keep this leaf in "
            "float32 and cast inside the model."
        )
    try:
        space.check_shape(leaf.shape)
    except StructureError as error:
        raise StructureError(f"{path}: {error}") from None


def _check_on_manifold(path: str, space: Manifold, leaf: Any, tolerance: float) -> None:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return  # entries are not known
    good, reason = space.check_point(leaf, explain=True, tolerance=tolerance)
    if not good:
        raise StructureError(f"{path}: {reason}")


def _check_patterns(manifold: Manifold | Mapping[str, Manifold], params: Params) -> None:
    """Refuses a pattern that matches neither a leaf nor what optax masks because another optimizer serves it."""
    hidden = tree_leaves_with_path(params, is_leaf=lambda v: isinstance(v, optax.MaskedNode))
    known = [*_names(params), *(path_string(p) for p, v in hidden if isinstance(v, optax.MaskedNode))]
    if isinstance(manifold, Manifold) or not known:
        return
    for pattern in manifold:
        if not any(_fits(pattern, path) for path in known):
            raise PatternError(
                f"{pattern}: no leaf of the parameters has such a path; nearest are {nearest(pattern, known)}."
            )


def _check_options(retraction: Any, transport: Any, renormalize_every: Any) -> None:
    check_choice("riemannian: retraction", retraction, ("exponential", "qr", "polar"))
    check_choice("riemannian: transport", transport, ("project", "isometric", "none"))
    check_int("riemannian: renormalize_every", renormalize_every)
