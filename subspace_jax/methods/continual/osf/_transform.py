"""Keeps OSF's trained factors orthogonal to its frozen singular vectors, around any optimizer."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import (
    OptState,
    Params,
    PyTree,
    Role,
    StructureError,
    Updates,
    check_choice,
    is_weight,
    leaves_with_paths,
    map_with_paths,
)
from subspace_jax.methods.continual.osf._frozen import high_of, in_loops, remove
from subspace_jax.methods.low_rank.svfit import SplitSVD
from subspace_jax.optim import (
    MatrixView,
    check_paths,
    is_hole,
    like_updates,
    map_matrices,
    matrix_views,
    refuse_unseen,
    reset_moments,
    rest_without_gradient,
    without_rounding,
)

Form = Literal["factored", "dense"]


class OSFState(NamedTuple):
    """State of `osf.projection`.

    Attributes:
      high: by path what is removed: the frozen singular vectors, or what `osf.removers` made of them.
      inner: state of the inner optimizer.
    """

    high: dict[str, Any]
    inner: Any


def projection(
    inner: optax.GradientTransformation,
    frozen: Params,
    *,
    project_gradients: bool = True,
    project_params: bool = True,
    mode: Form = "factored",
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the trained factors of `sj.osf` orthogonal to the frozen singular vectors, for any optimizer.

    Before the optimizer \(G_L \mapsto G_L - L_h L_h^T G_L\) and \(G_R \mapsto G_R - G_R R_h^T R_h\), which plain SGD
    needs alone; after it, since Adam turns a projected gradient out of the allowed space, the parameters are projected
    in the same way: \(u' = P(\theta + u) - \theta\). Then the change \(\Delta\) of a weight has
    \(L_h^T \Delta = 0\) and \(\Delta R_h^T = 0\). Singular values are left alone.

    Decoupled weight decay in the inner optimizer shrinks the trained part to zero, which is not decay of the weight:
    keep it at 0.01 and below.

    Operations of a step with a square weight of width d: with half of the triples frozen \(4 d^3\) for the projections
    and \(3 d^3\) for forming the weight and its gradient, where a plain step of n rows has \(6 n d^2\). As compiled at
    d = 512 and n = 4096, with Adam: 1.15 times the plain step with half of the triples frozen, 0.95 times with seven
    eighths, 1.46 times with half and the common width, whose columns of zeros are multiplied too. On a mesh
    (`sj.shardings`, `sj.state_shardings`) factors and states are split both ways, as the weight; a projection then
    gathers one of its factors over the devices that split its rank. Stacks of large matrices are projected a layer
    after the other, on a mesh where `frozen` is given with shardings that do not split the layers.

    Args:
      inner: the optimizer; AdamW at 1e-5 in the authors' runs.
      frozen: the adapted tree, or the frozen one of `sj.partition`: its `SplitSVD` weights give the singular vectors,
        by path. Leaves without one go through the inner optimizer alone. Or what `osf.removers` made of it, with which
        a wide frozen part is multiplied once.
      project_gradients: whether to project before the optimizer; without it the constraint holds as well, and the
        moments are those of the whole gradient.
      project_params: whether to project after it; the authors' first code and PEFT do not, and leak under Adam.
      mode: "factored", the published one, for the factors of `SplitSVD`; or "dense", of this library, for whole arrays
        at the same paths: \(G \mapsto (I - L_h L_h^T)\,G\,(I - R_h^T R_h)\), and the update likewise. It has the same
        constraint and half the memory, but another path: factors scale gradients by \(s^2\).
      roles: how the model uses plain arrays with more than two axes, for "dense".

    Returns:
      A transformation that keeps structure and shapes, and dtypes but for a narrower gradient's: updates that end at
      projected factors have the factors' dtype. Its `update` takes `frozen=` to override the state's
      for one step; `osf.next_task` replaces it between tasks without compiling again where shapes are the same.

    Raises:
      StructureError: there is no `SplitSVD` in `frozen`, a path has a leaf of the other mode, or shapes differ.
      PatternError: at `init` or `update`, a `SplitSVD` of `frozen` is for no leaf.
      RoleError: at `init`, with "dense", an array is not known to be a matrix.
      ValueError: `mode` is unknown; at `update`, `params` is missing with `project_params` and "factored".

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.osf(2)}, key=jax.random.key(0))
      >>> trainable, frozen = sj.partition(adapted)
      >>> optimizer = sj.methods.osf.projection(optax.adam(0.1), frozen)
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> trained = sj.merge(sj.combine(optax.apply_updates(trainable, updates), frozen))["w"]
      >>> bool(jnp.abs(frozen["w"].high_left.T @ (trained - w)).max() < 1e-5), bool(jnp.abs(trained - w).max() > 0.01)
      (True, True)
    """
    check_choice("osf.projection: mode", mode, ("factored", "dense"))
    extended = rest_without_gradient(inner)
    given = high_of(frozen)
    loops = in_loops(given)

    def projected(tree: PyTree, high: dict[str, Any]) -> Updates:
        return _dense(tree, high, loops, roles) if mode == "dense" else _factored(tree, high, loops, drop_rounding=True)

    def init(params: Params) -> OSFState:
        check_paths(given, params, "SplitSVD")
        _check(given, params, mode)
        if mode == "dense":
            refuse_unseen(params, matrix_views(params, roles), given)
        return OSFState(jax.tree.map(jnp.copy, dict(given)), extended.init(params))

    def update(
        updates: Updates, state: OptState, params: Params = None, *, frozen: Params = None, **extra: Any
    ) -> tuple[Updates, OSFState]:
        if params is None and project_params and mode == "factored":
            raise ValueError("osf.projection: update needs params=, the current parameters, to project them.")
        high = jax.lax.stop_gradient(state.high if frozen is None else high_of(frozen))
        check_paths(high, updates, "SplitSVD", gradients=True)
        _check(high, updates, mode)
        gradients = projected(updates, high) if project_gradients else updates
        steps, held = extended.update(gradients, state.inner, params, **extra)
        if project_params and mode == "dense":
            steps = projected(steps, high)
        elif project_params:
            steps = _after(steps, like_updates(steps, params), high, loops)
        return steps, OSFState(state.high, held)

    return optax.GradientTransformationExtraArgs(init, update)


def next_task(state: OptState, frozen: Params) -> OptState:
    """Returns an optimizer state for the next task: new singular vectors, and moments that start again.

    Args:
      state: of a chain, `multi_transform`, `MultiSteps` or the like, with an `osf.projection` in it.
      frozen: the newly adapted tree, or its frozen part, or `osf.removers` of it where the state has those. With
        `sj.osf(..., width="common")` its shapes are those of the last task, and nothing compiles again.

    Raises:
      StructureError: there is no `osf.projection` in the state, or the paths or shapes of its weights changed.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapt = lambda k: sj.adapt({"w": jnp.eye(4)}, {"w": sj.osf(k, width="common")}, key=jax.random.key(0))
      >>> optimizer = sj.methods.osf.projection(optax.adam(0.1), adapt(1))
      >>> state = optimizer.init(sj.partition(adapt(1))[0])
      >>> next_task(state, adapt(3)).high["w"].live.tolist()
      [0.0, 0.0, 0.0, 1.0]
    """
    new, count = high_of(frozen), 0

    def one(node: Any) -> Any:
        nonlocal count
        if not isinstance(node, OSFState):
            return node
        count += 1
        shapes = [jax.tree.map(lambda v: (v.shape, v.dtype), high) for high in (node.high, new)]
        if shapes[0] != shapes[1]:
            path = sorted(p for p in {*node.high, *new} if shapes[0].get(p) != shapes[1].get(p))[0]
            raise StructureError(
                f"{path}: the new weight has {shapes[1].get(path)}, the state {shapes[0].get(path)}. Adapt with "
                'sj.osf(..., width="common"), whose shapes are those of every rank; or make a new optimizer.'
            )
        return OSFState(jax.tree.map(jnp.copy, new), reset_moments(node.inner))

    replaced = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, OSFState))
    if not count:
        raise StructureError("osf.next_task: the optimizer state holds no osf.projection.")
    return replaced


def _check(high: Mapping[str, Any], tree: PyTree, mode: Form) -> None:
    """Refuses leaves of the other mode, and of other shapes than the frozen part."""
    for path, leaf in leaves_with_paths(tree):
        if path not in high or not jax.tree.leaves(leaf):
            continue
        if is_weight(leaf) != (mode == "factored") or (is_weight(leaf) and not isinstance(leaf, SplitSVD)):
            raise StructureError(
                f'{path}: is a {type(leaf).__name__}, but mode="{mode}" expects '
                f"{'a SplitSVD, from sj.osf' if mode == 'factored' else 'the whole array'}."
            )
        if isinstance(leaf, SplitSVD) and not (is_hole(leaf.left) or is_hole(leaf.right)):
            shapes = leaf.left.shape[-2], leaf.right.shape[-1]
            expected = high[path].sizes
            if shapes != expected:
                raise StructureError(f"{path}: factors of sizes {shapes}, but the frozen part is of {expected}.")


def _factored(tree: PyTree, high: Mapping[str, Any], loops: Container[str], *, drop_rounding: bool = False) -> PyTree:
    """The factors of every `SplitSVD` projected off its frozen part, with padding set to zero."""

    def one(path: str, leaf: Any) -> Any:
        found = high.get(path)
        if found is None or not isinstance(leaf, SplitSVD):
            return leaf
        live = 1.0 if found.live is None else found.live

        def factor(name: str, value: Any) -> Any:
            if name == "core":
                return value * jnp.asarray(live, value.dtype)
            if name not in ("left", "right"):
                return value
            new = remove(found, value, "in" if name == "left" else "out", loop=path in loops)
            new = without_rounding(new, value) if drop_rounding else new
            if found.live is not None:
                new = new * (found.live[..., None, :] if name == "left" else found.live[..., :, None])
            return new.astype(value.dtype)

        return leaf.map_fields(lambda name, value: value if is_hole(value) else factor(name, value))

    return map_with_paths(one, tree)


def _after(steps: Updates, params: Params, high: Mapping[str, Any], loops: Container[str]) -> PyTree:
    """The steps that lead to projected parameters, in the dtype of the parameters."""

    def one(path: str, step: Any, param: Any) -> Any:
        if not isinstance(step, SplitSVD) or path not in high:
            return step
        return jax.tree.map(lambda u, p: p + u.astype(p.dtype), step, param)

    moved = map_with_paths(one, steps, params)

    def back(path: str, step: Any, param: Any, new: Any) -> Any:
        if not isinstance(step, SplitSVD) or path not in high:
            return step
        return jax.tree.map(lambda n, p: n - p, new, param)

    return map_with_paths(back, steps, params, _factored(moved, high, loops))


def _dense(tree: PyTree, high: Mapping[str, Any], loops: Container[str], roles: Mapping[str, Role] | None) -> PyTree:
    """Whole arrays without what lies in the frozen part's columns or rows."""

    def one(matrix: jax.Array, view: MatrixView) -> jax.Array:
        found = remove(high[view.path], matrix, "in", "out", loop=view.path in loops)
        return without_rounding(found, matrix)

    return map_matrices(one, tree, roles, high)
