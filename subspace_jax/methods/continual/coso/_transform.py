"""`coso`: Adam in low-rank subspaces orthogonal to a history of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from subspace_jax.core import RankError, Role, leaves_with_paths, placed_like, select_paths
from subspace_jax.linalg import frequent_directions, project, to_coordinates, transport, truncated_svd
from subspace_jax.optim import SubspaceMap, matrix_shape, matrix_views, subspace_map


class CosoSubspace(NamedTuple):
    r"""The subspaces of one array; \(m\) is the size of the side that they lie in. All float32 but the count.

    Attributes:
      basis: \(P\), `[*stack, m, r1]`, of the current gradient.
      sketch: \(S\), `[*stack, m, r2]`, of this task's gradients.
      history: \(M\), `[*stack, m, capacity]`, of earlier tasks: orthonormal columns, then zeros.
      used: number of live columns of `history`, `[*stack]` int32. Learning stops where it comes to \(m\).
    """

    basis: jax.Array
    sketch: jax.Array
    history: jax.Array
    used: jax.Array


class CosoState(NamedTuple):
    """State of `coso`.

    Attributes:
      count: int32 scalar, steps taken in this task.
      subspaces: a tree like the parameters with a `CosoSubspace` for each array that has one, `optax.MaskedNode` for
        the others.
      mu: first moments, `[*stack, r1, out]` for side "input", `[*stack, in, r1]` for side "output", float32; of an
        array without a subspace, its shape.
      nu: second moments, like `mu`.
    """

    count: jax.Array
    subspaces: Any
    mu: Any
    nu: Any


def coso(
    learning_rate: optax.ScalarOrSchedule,
    r1: int = 15,
    r2: int = 100,
    gap: int = 1,
    side: Literal["output", "input"] = "output",
    *,
    tasks: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    guard: bool = True,
    rotate_moments: bool = False,
    select: Callable[[str, Any], bool] | str | Iterable[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in subspaces of the current gradients that are orthogonal to what earlier tasks used.

    With a gradient \(G\) whose first axis is the chosen side, and the history \(M\): every `gap` steps
    \(U \Sigma V^T = G - M M^T G\), \(P = U_{:r_1}\), and \(U_{:r_2} \Sigma_{:r_2}\) goes into a Frequent Directions
    sketch of the task. Every step Adam runs on \(P^T G\), which is \(r_1\) times the other side, and
    \(u = -\eta_t\,P\,\mu / (\sqrt{\nu} + \epsilon)\) with \(\eta_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)\): the
    correction scales the step, not \(\epsilon\). After each task call `coso.next_task`.

    Without weight decay \(M^T u = 0\). For side "input": old inputs in the span of \(M\) have unchanged outputs. For
    "output", the official one: old outputs keep their components along \(M\). What else learns beside the kernels, such
    as biases and norms, forgets: leave them frozen, and give heads to another optimizer by `optax.multi_transform`.

    Ranks of the published runs: (r1, r2, gap) of (15, 100, 1) on CIFAR-100, (50, 120, 1) on ImageNet-R and
    (70, 160, 20) on DomainNet, for attention output kernels of a ViT-B/16. A step that does not refresh has 1.01 times
    the operations of a plain Adam step, as compiled for a kernel of width 512, 4096 rows and an \(r_1\) of 70. A
    refresh has a singular value decomposition of the gradient and one of a matrix of \(2 r_2\) columns beside.

    Args:
      learning_rate: \(\eta\), a number or a schedule of the steps within a task.
      r1: rank of the subspaces; of a smaller matrix, its smaller side.
      r2: rank of the sketch, at least `r1`.
      gap: steps from one subspace to the next.
      side: "output", or "input", which is of this library.
      tasks: number of tasks that there is room for: the history has \(\min(m, \mathrm{tasks} \cdot r_2)\) columns.
      b1: \(\beta_1\).
      b2: \(\beta_2\).
      eps: \(\epsilon\).
      weight_decay: decoupled, times the rate; above zero it breaks the constraint.
      guard: project \(P\) itself off the history. The official code does not; singular vectors of rounding, where the
        gradient's rank is below `r1`, then reach into it, and Adam gives them full steps.
      rotate_moments: take the first moments into the new subspace, \(\mu \mapsto P_{new}^T P_{old}\,\mu\); the official
        code keeps them as they are, as GaLore does.
      select: globs or a predicate of path and array that choose which matrices get subspaces; every one if None. All
        else gets the same Adam in full.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes.

    Raises:
      RankError: a rank, `gap` or `tasks` is not a positive integer, or `r2` is below `r1`.
      PatternError: a glob matches nothing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> params = {"kernel": jnp.ones((4, 9))}
      >>> optimizer = sj.coso(1e-2, r1=2, r2=3, tasks=2)
      >>> updates, state = optimizer.update(params, optimizer.init(params))
      >>> state = sj.methods.coso.next_task(state)
      >>> found = state.subspaces["kernel"]
      >>> found.history.shape, found.used.item(), state.mu["kernel"].shape
      ((9, 6), 1, (4, 2))
    """
    _check_options(r1, r2, gap, side, tasks)
    rule = "out" if side == "output" else "in"

    def wanted(params: Any) -> list[SubspaceMap | None]:
        paths = {p for p, _ in leaves_with_paths(params)} if select is None else set(select_paths(params, select))
        found = zip(jax.tree.leaves(params), matrix_views(params, roles), strict=True)
        places = [subspace_map(view, leaf, rule) for leaf, view in found]
        return [p if p is not None and p.view.path in paths else None for p in places]

    def init(params: Any) -> CosoState:
        leaves, treedef = jax.tree.flatten(params)
        subspaces, moments = [], []
        for leaf, place in zip(leaves, wanted(params), strict=True):
            subspaces.append(optax.MaskedNode() if place is None else _start(leaf, place, r1, r2, tasks))
            moments.append(_no_moments(leaf, place, r1))
        unflat = lambda values: jax.tree.unflatten(treedef, values)  # noqa: E731
        return CosoState(
            jnp.zeros([], jnp.int32), unflat(subspaces), unflat(moments), unflat([jnp.zeros_like(m) for m in moments])
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, CosoState]:
        del extra
        if weight_decay and params is None:
            raise ValueError("coso: weight_decay needs params=, the current parameters.")
        leaves, treedef = jax.tree.flatten(updates)
        subspaces, first, second = (treedef.flatten_up_to(tree) for tree in (state.subspaces, state.mu, state.nu))
        seen = matrix_views(updates, roles)
        places = [
            None if isinstance(s, optax.MaskedNode) else subspace_map(view, leaf, rule)
            for leaf, view, s in zip(leaves, seen, subspaces, strict=True)
        ]

        def refresh() -> tuple[list[Any], list[Any]]:
            new = [
                s if p is None else _refreshed(p, leaf, s, guard)
                for p, leaf, s in zip(places, leaves, subspaces, strict=True)
            ]
            if not rotate_moments:
                return new, first
            moved = [
                m if p is None else placed_like(transport(m, s.basis, n.basis, side=p.side), m)
                for p, m, s, n in zip(places, first, subspaces, new, strict=True)
            ]
            return new, moved

        subspaces, first = lax.cond(state.count % gap == 0, refresh, lambda: (subspaces, first))
        gradients = [_wide(leaf, p, s, guard) for leaf, p, s in zip(leaves, places, subspaces, strict=True)]
        first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
        second = [b2 * v + (1 - b2) * jnp.square(g) for v, g in zip(second, gradients, strict=True)]

        count = jnp.asarray(optax.safe_increment(state.count))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        time = count.astype(jnp.float32)
        size = rate * jnp.sqrt(1 - b2**time) / (1 - b1**time)
        steps = [
            _lifted(-size * m / (jnp.sqrt(v) + eps), p, s, leaf)
            for m, v, p, s, leaf in zip(first, second, places, subspaces, leaves, strict=True)
        ]
        if weight_decay:
            steps = [
                u - (rate * weight_decay * w).astype(u.dtype)
                for u, w in zip(steps, jax.tree.leaves(params), strict=True)
            ]
        unflat = lambda values: jax.tree.unflatten(treedef, values)  # noqa: E731
        return unflat(steps), CosoState(count, unflat(subspaces), unflat(first), unflat(second))

    return optax.GradientTransformationExtraArgs(init, update)


def _start(leaf: jax.Array, place: SubspaceMap, r1: int, r2: int, tasks: int) -> CosoSubspace:
    shape = matrix_shape(leaf, place.view)
    size = shape[-2 if place.side == "in" else -1]
    widths = min(r1, *shape[-2:]), min(r2, size), min(size, tasks * r2)
    basis, sketch, history = (place.empty(leaf, width, basis=True) for width in widths)
    return CosoSubspace(basis, sketch, history, jnp.zeros(shape[:-2], jnp.int32))


def _no_moments(leaf: jax.Array, place: SubspaceMap | None, r1: int) -> jax.Array:
    if place is None:
        return jnp.zeros_like(leaf, dtype=jnp.float32)
    width = min(r1, *matrix_shape(leaf, place.view)[-2:])
    return place.empty(leaf.astype(jnp.float32), width, basis=False)


def _wide(leaf: jax.Array, place: SubspaceMap | None, subspace: Any, guard: bool) -> jax.Array:
    """A gradient in float32, in coordinates where there is a subspace."""
    wide = leaf.astype(jnp.float32)
    if place is None:
        return wide
    if guard:  # the basis is orthogonal to the history, so that projecting the gradient first would change nothing
        return place.coordinates(wide, subspace.basis)
    matrix = project(place.view.unfold(wide), subspace.history, mode="remove", side=place.side)
    return to_coordinates(matrix, subspace.basis, side=place.side)


def _lifted(step: jax.Array, place: SubspaceMap | None, subspace: Any, leaf: jax.Array) -> jax.Array:
    return step.astype(leaf.dtype) if place is None else place.lifted(step, subspace.basis, 1.0, leaf)


def _refreshed(place: SubspaceMap, leaf: jax.Array, old: CosoSubspace, guard: bool) -> CosoSubspace:
    """The subspace and the sketch with the current gradient in them."""
    matrix = place.view.unfold(leaf).astype(jnp.float32)
    left = project(matrix, old.history, mode="remove", side=place.side)
    columns, values = _columns(left, place.side)
    basis = columns[..., : old.basis.shape[-1]]
    if guard:
        for _ in range(2):  # columns of rounding lie in the history nearly whole, and once leaves rounding of them
            basis = project(basis, old.history, mode="remove")
    width = old.sketch.shape[-1]
    sketch = frequent_directions(old.sketch, (columns * values[..., None, :])[..., :width])
    return old._replace(basis=placed_like(basis, old.basis), sketch=placed_like(sketch, old.sketch))


def _columns(matrix: jax.Array, side: str) -> tuple[jax.Array, jax.Array]:
    """Singular vectors of one side as columns, and singular values."""
    u, s, vt = truncated_svd(matrix, min(matrix.shape[-2:]))
    return (u if side == "in" else jnp.swapaxes(vt, -1, -2)), s


def _check_options(r1: Any, r2: Any, gap: Any, side: Any, tasks: Any) -> None:
    for name, value in (("r1", r1), ("r2", r2), ("gap", gap), ("tasks", tasks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankError(f"coso: {name}={value!r}; expected a positive Python int.")
    if r2 < r1:
        raise RankError(f"coso: r2={r2} is below r1={r1}; the sketch has at least the rank of the subspaces.")
    if side not in ("output", "input"):
        raise ValueError(f'coso: side={side!r} is "output" or "input".')
