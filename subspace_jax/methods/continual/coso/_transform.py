"""`scale_by_coso` and `coso`: Adam in low-rank subspaces orthogonal to a history of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from subspace_jax.core import (
    OptState,
    Params,
    RankError,
    Role,
    Updates,
    check_choice,
    check_int,
    leaves_with_paths,
    placed_like,
    select_paths,
)
from subspace_jax.linalg import Side, frequent_directions, project, to_coordinates, transport, truncated_svd
from subspace_jax.optim import (
    Leaves,
    SubspaceMap,
    is_hole,
    is_zero,
    like_updates,
    matrix_shape,
    matrix_views,
    subspace_map,
    without_rounding,
)


class CosoState(NamedTuple):
    r"""State of `coso`: trees like the parameters, with `optax.MaskedNode` for arrays without a subspace.

    With \(m\) the size of the side that the subspaces lie in; all float32 but the counts.

    Attributes:
      count: int32 scalar, steps taken in this task.
      basis: \(P\), `[*stack, m, r1]`, of the current gradient.
      sketch: \(S\), `[*stack, m, r2]`, of this task's gradients.
      history: \(M\), `[*stack, m, capacity]`, of earlier tasks: orthonormal columns, then zeros.
      used: number of live columns of `history`, `[*stack]` int32. Learning stops where it comes to \(m\).
      mu: first moments, `[*stack, r1, out]` for side "in", `[*stack, in, r1]` for side "out"; of an array without a
        subspace, its shape.
      nu: second moments, like `mu`.
    """

    count: jax.Array
    basis: Any
    sketch: Any
    history: Any
    used: Any
    mu: Any
    nu: Any


class _Subspace(NamedTuple):
    """The subspaces of one array; see `CosoState`."""

    basis: jax.Array
    sketch: jax.Array
    history: jax.Array
    used: jax.Array


def scale_by_coso(
    r1: int = 15,
    r2: int = 100,
    gap: int = 1,
    side: Side = "out",
    *,
    tasks: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    guard: bool = True,
    rotate_moments: bool = False,
    select: Callable[[str, Any], bool] | str | Iterable[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns CoSO's direction, without a learning rate: Adam in subspaces orthogonal to what earlier tasks used.

    With a gradient \(G\) whose first axis is the chosen side, and the history \(M\): every `gap` steps
    \(U \Sigma V^T = G - M M^T G\), \(P = U_{:r_1}\), and \(U_{:r_2} \Sigma_{:r_2}\) goes into a Frequent Directions
    sketch of the task. Every step Adam runs on \(P^T G\), which is \(r_1\) times the other side, and
    \(u = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,P\,\mu / (\sqrt{\nu} + \epsilon)\): the correction scales the
    step, not \(\epsilon\). After each task call `coso.next_task`.

    Args:
      r1: rank of the subspaces; of a smaller matrix, its smaller side.
      r2: rank of the sketch, at least `r1`.
      gap: steps from one subspace to the next.
      side: which side the subspaces lie in: "out", the official one, or "in", which is of this library.
      tasks: number of tasks that there is room for: the history has \(\min(m, \mathrm{tasks} \cdot r_2)\) columns.
      b1: \(\beta_1\).
      b2: \(\beta_2\).
      eps: \(\epsilon\).
      guard: project \(P\) itself off the history. The official code does not; singular vectors of rounding, where the
        gradient's rank is below `r1`, then reach into it, and Adam gives them full steps.
      rotate_moments: take the first moments into the new subspace, \(\mu \mapsto P_{new}^T P_{old}\,\mu\); the official
        code keeps them as they are, as GaLore does.
      select: globs or a predicate of path and array that choose which matrices get subspaces; every one if None. All
        else gets the same Adam in full.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `r1`, `r2`, `gap`,
      `tasks` and a predicate `select` in `static_args`.

    Raises:
      RankError: a rank, `gap` or `tasks` is not a positive integer, or `r2` is below `r1`.
      PatternError: a glob matches nothing.
      ValueError: `side` is unknown.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.scale_by_coso(r1=2, r2=3, side="in", tasks=2).init({"kernel": jnp.ones((4, 9))})
      >>> state.history["kernel"].shape, state.mu["kernel"].shape
      ((4, 4), (2, 9))
    """
    _check_options(r1, r2, gap, side, tasks)

    def wanted(params: Params) -> list[SubspaceMap | None]:
        paths = {p for p, _ in leaves_with_paths(params)} if select is None else set(select_paths(params, select))
        found = zip(jax.tree.leaves(params), matrix_views(params, roles), strict=True)
        places = [subspace_map(view, leaf, side) for leaf, view in found]
        return [p if p is not None and p.view.path in paths else None for p in places]

    def init(params: Params) -> CosoState:
        held = Leaves(params)
        # optax initializes with a tree without leaves to tell what of a state is like the parameters.
        places = wanted(params) if held.arrays else []
        subspaces = [_start(leaf, place, r1, r2, tasks) for leaf, place in zip(held.arrays, places, strict=True)]
        moments = [_no_moments(leaf, place, r1) for leaf, place in zip(held.arrays, places, strict=True)]
        trees = {name: held.tree([getattr(s, name) for s in subspaces]) for name in _Subspace._fields}
        nu = held.tree([jnp.zeros_like(m) for m in moments])
        return CosoState(count=jnp.zeros([], jnp.int32), **trees, mu=held.tree(moments), nu=nu)

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, CosoState]:
        del params, extra
        held = Leaves(updates)
        trees = state.basis, state.sketch, state.history, state.used
        subspaces = [_Subspace(*parts) for parts in zip(*map(held.of, trees), strict=True)]
        first, second = held.of(state.mu), held.of(state.nu)
        places = [
            None if is_hole(s.basis) else subspace_map(view, leaf, side)
            for leaf, view, s in zip(held.arrays, matrix_views(updates, roles), subspaces, strict=True)
        ]

        def refresh() -> tuple[list[Any], list[Any]]:
            new = [
                s if p is None else _refreshed(p, leaf, s, guard)
                for p, leaf, s in zip(places, held.arrays, subspaces, strict=True)
            ]
            if not rotate_moments:
                return new, first
            moved = [
                m if p is None else placed_like(transport(m, s.basis, n.basis, side=p.side), m)
                for p, m, s, n in zip(places, first, subspaces, new, strict=True)
            ]
            return new, moved

        subspaces, first = lax.cond(state.count % gap == 0, refresh, lambda: (subspaces, first))
        gradients = [_wide(leaf, p, s, guard) for leaf, p, s in zip(held.arrays, places, subspaces, strict=True)]
        first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
        second = [b2 * v + (1 - b2) * jnp.square(g) for v, g in zip(second, gradients, strict=True)]

        count = jnp.asarray(optax.safe_increment(state.count))
        time = count.astype(jnp.float32)
        size = jnp.sqrt(1 - b2**time) / (1 - b1**time)
        steps = [
            _lifted(size * m / (jnp.sqrt(v) + eps), p, s, leaf)
            for m, v, p, s, leaf in zip(first, second, places, subspaces, held.arrays, strict=True)
        ]
        new = {
            name: held.kept([getattr(s, name) for s in subspaces], old)
            for name, old in zip(_Subspace._fields, trees, strict=True)
        }
        new |= {"mu": held.kept(first, state.mu), "nu": held.kept(second, state.nu)}
        return held.tree(steps), CosoState(count=count, **new)

    return optax.GradientTransformationExtraArgs(init, update)


def coso(
    learning_rate: optax.ScalarOrSchedule,
    r1: int = 15,
    r2: int = 100,
    gap: int = 1,
    side: Side = "out",
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
    r"""Returns Adam in subspaces of the current gradients that are orthogonal to what earlier tasks used.

    With a gradient \(G\) whose first axis is the chosen side, and the history \(M\): every `gap` steps
    \(U \Sigma V^T = G - M M^T G\), \(P = U_{:r_1}\), and \(U_{:r_2} \Sigma_{:r_2}\) goes into a Frequent Directions
    sketch of the task. Every step Adam runs on \(P^T G\), which is \(r_1\) times the other side, and
    \(u = -\eta_t\,P\,\mu / (\sqrt{\nu} + \epsilon)\) with \(\eta_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)\): the
    correction scales the step, not \(\epsilon\). After each task call `coso.next_task`.

    Without weight decay \(M^T u = 0\). For side "in": old inputs in the span of \(M\) have unchanged outputs. For
    "out", the official one: old outputs keep their components along \(M\). What else learns beside the kernels, such
    as biases and norms, forgets: leave them frozen, and give heads to another optimizer by `optax.multi_transform`.

    Ranks of the published runs: (r1, r2, gap) of (15, 100, 1) on CIFAR-100, (50, 120, 1) on ImageNet-R and
    (70, 160, 20) on DomainNet, for attention output kernels of a ViT-B/16. A step that does not refresh has 1.01 times
    the operations of a plain Adam step, as compiled for a kernel of width 512, 4096 rows and an \(r_1\) of 70. A
    refresh has a singular value decomposition of the gradient and one of a matrix of \(2 r_2\) columns beside: on two
    cores 2.1 times the plain step, so that with a gap of 20 a step takes 1.03 times as long on average
    (`python -m benchmarks run projected_step`, LAPACK on one thread by `OPENBLAS_NUM_THREADS=1`).

    Args:
      learning_rate: \(\eta\), a number or a schedule of the steps within a task.
      r1: rank of the subspaces; of a smaller matrix, its smaller side.
      r2: rank of the sketch, at least `r1`.
      gap: steps from one subspace to the next.
      side: which side the subspaces lie in: "out", the official one, or "in", which is of this library.
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
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`. With
      `optax.inject_hyperparams` name `r1`, `r2`, `gap`, `tasks` and a predicate `select` in `static_args`.

    Raises:
      RankError: a rank, `gap` or `tasks` is not a positive integer, or `r2` is below `r1`.
      PatternError: a glob matches nothing.
      ValueError: `side` is unknown; at `update`, `params` is missing for the weight decay.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> params = {"kernel": jnp.ones((4, 9))}
      >>> optimizer = sj.coso(1e-2, r1=2, r2=3, tasks=2)
      >>> updates, state = optimizer.update(params, optimizer.init(params))
      >>> state = sj.methods.coso.next_task(state)
      >>> state.history["kernel"].shape, state.used["kernel"].item(), state.mu["kernel"].shape
      ((9, 6), 1, (4, 2))
    """
    direction = scale_by_coso(
        r1,
        r2,
        gap,
        side,
        tasks=tasks,
        b1=b1,
        b2=b2,
        eps=eps,
        guard=guard,
        rotate_moments=rotate_moments,
        select=select,
        roles=roles,
    )

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, CosoState]:
        if params is None and not is_zero(weight_decay):
            raise ValueError("coso: weight_decay needs params=, the current parameters.")
        # The steps of this task, which `next_task` resets: a chained schedule would continue.
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        directions, state = direction.update(updates, state, params, **extra)

        def step(u: jax.Array, w: jax.Array | None = None) -> jax.Array:
            decayed = u if w is None else u + weight_decay * w
            return (-rate * decayed).astype(u.dtype)

        trees = [] if is_zero(weight_decay) else [like_updates(updates, params)]
        return jax.tree.map(step, directions, *trees), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def _start(leaf: jax.Array, place: SubspaceMap | None, r1: int, r2: int, tasks: int) -> _Subspace:
    if place is None:
        return _Subspace(*(optax.MaskedNode(),) * 4)  # pyright: ignore[reportArgumentType]
    shape = matrix_shape(leaf, place.view)
    size = shape[-2 if place.side == "in" else -1]
    widths = min(r1, *shape[-2:]), min(r2, size), min(size, tasks * r2)
    basis, sketch, history = (place.empty(leaf, width, basis=True) for width in widths)
    return _Subspace(basis, sketch, history, jnp.zeros(shape[:-2], jnp.int32))


def _no_moments(leaf: jax.Array, place: SubspaceMap | None, r1: int) -> jax.Array:
    if place is None:
        return jnp.zeros_like(leaf, dtype=jnp.float32)
    width = min(r1, *matrix_shape(leaf, place.view)[-2:])
    return place.empty(leaf.astype(jnp.float32), width, basis=False)


def _wide(leaf: jax.Array, place: SubspaceMap | None, subspace: _Subspace, guard: bool) -> jax.Array:
    """A gradient in float32, in coordinates where there is a subspace."""
    wide = leaf.astype(jnp.float32)
    if place is None:
        return wide
    if guard:  # the basis is orthogonal to the history, so that projecting the gradient first would change nothing
        return place.coordinates(wide, subspace.basis, drop_rounding=True)
    matrix = project(place.view.unfold(wide), subspace.history, mode="remove", side=place.side)
    return to_coordinates(matrix, subspace.basis, side=place.side)


def _lifted(step: jax.Array, place: SubspaceMap | None, subspace: Any, leaf: jax.Array) -> jax.Array:
    return step.astype(leaf.dtype) if place is None else place.lifted(step, subspace.basis, 1.0, leaf)


def _refreshed(place: SubspaceMap, leaf: jax.Array, old: _Subspace, guard: bool) -> _Subspace:
    """The subspace and the sketch with the current gradient in them."""
    matrix = place.on_side(place.view.unfold(leaf).astype(jnp.float32))
    left = without_rounding(project(matrix, old.history, mode="remove"), matrix)
    found = truncated_svd(left, min(left.shape[-2:]))
    basis = found.u[..., : old.basis.shape[-1]]
    if guard:
        for _ in range(2):  # columns of rounding lie in the history nearly whole, and once leaves rounding of them
            basis = project(basis, old.history, mode="remove")
    width = old.sketch.shape[-1]
    sketch = frequent_directions(old.sketch, (found.u * found.s[..., None, :])[..., :width])
    return old._replace(basis=placed_like(basis, old.basis), sketch=placed_like(sketch, old.sketch))


def _check_options(r1: Any, r2: Any, gap: Any, side: Any, tasks: Any) -> None:
    for name, value in (("r1", r1), ("r2", r2), ("gap", gap), ("tasks", tasks)):
        check_int(f"coso: {name}", value)
    if r2 < r1:
        raise RankError(f"coso: r2={r2} is below r1={r1}; the sketch has at least the rank of the subspaces.")
    if side in ("input", "output"):
        raise ValueError(f'coso: side={side!r} is now called "{side.removesuffix("put")}".')
    check_choice("coso: side", side, ("in", "out"))
