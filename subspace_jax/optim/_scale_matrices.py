"""Optimizers that treat every matrix as one thing, and all that is no matrix by Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Role, Updates, placed_like
from subspace_jax.optim._holes import Leaves, is_hole
from subspace_jax.optim._matrix_views import MatrixView, matrix_views

# Arrays of a matrix's state by name, each `[*stack, ...]` in float32.
Parts = dict[str, jax.Array]


class MatricesState(NamedTuple):
    """State of an optimizer of matrices.

    Attributes:
      count: steps so far, int32 scalar.
      matrices: by name, trees like the parameters of what is kept of every matrix, in float32;
        `optax.MaskedNode` for everything else.
      mu: Adam's first moments of everything else; `optax.MaskedNode` for matrices.
      nu: second moments, likewise.
    """

    count: jax.Array
    matrices: dict[str, Any]
    mu: Any
    nu: Any


class MatrixStep(NamedTuple):
    """Which matrix at which step.

    Attributes:
      count: number of the step, from 1.
      path: of the leaf.
      param: the parameters, `[*stack, in, out]` in float32; None unless they are asked for.
    """

    count: jax.Array
    path: str
    param: jax.Array | None


def adam_direction(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, count: jax.Array, b1: float, b2: float, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Returns Adam's direction \(\hat m / (\sqrt{\hat v} + \epsilon)\) of one array, and its new moments, in float32.

    Args:
      gradient: of any dtype.
      mu: first moment.
      nu: second moment.
      count: number of this step, from 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Example:
      >>> import jax.numpy as jnp
      >>> zero = jnp.zeros(2)
      >>> adam_direction(jnp.array([3.0, -3.0]), zero, zero, jnp.int32(1), 0.9, 0.95, 0.0)[0].round(4).tolist()
      [1.0, -1.0]
    """
    wide = gradient.astype(jnp.float32)
    mu, nu = b1 * mu + (1 - b1) * wide, b2 * nu + (1 - b2) * wide * wide
    return (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps), mu, nu


def scale_matrices(
    start: Callable[[jax.Array, str], Parts],
    step: Callable[[jax.Array, Parts, MatrixStep], tuple[jax.Array, Parts]],
    *,
    largest: int,
    b1: float,
    b2: float,
    eps: float,
    vector_scale: float = 1.0,
    needs_params: bool = False,
    together: Callable[[Mapping[str, tuple[jax.Array, Parts]]], Mapping[str, Parts]] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    """Builds a transformation from an update rule for stacks of matrices; all other arrays get Adam's direction.

    Args:
      start: `start(zeros, path)` returns the state of a stack of matrices, from zeros `[*stack, in, out]` in float32.
      step: `step(gradient, parts, at)` returns the update and the new state, all in float32. It is called once for each
        array, and handles stacks by batching.
      largest: matrices with a longer side than this, as embeddings, have Adam.
      b1: decay of Adam's first moment.
      b2: decay of its second moment.
      eps: added to the root of its second moment.
      vector_scale: Adam's direction is multiplied by this.
      needs_params: pass the parameters to `step`, else None.
      together: `together({path: (gradient, parts)})` returns what some of the matrices are told of each other, by path,
        which `step` finds among their parts and does not keep.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes; a leaf without a gradient keeps its state.

    Raises:
      ValueError: at `update`, `params` is None with `needs_params`.

    Example:
      >>> import jax.numpy as jnp
      >>> signs = scale_matrices(lambda zeros, path: {}, lambda gradient, parts, at: (jnp.sign(gradient), parts),
      ...                        largest=100, b1=0.9, b2=0.95, eps=1e-8)
      >>> updates, _ = signs.update({"w": 3 * jnp.eye(2)}, signs.init({"w": jnp.eye(2)}))
      >>> updates["w"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def is_matrix(leaf: Any, view: MatrixView | None) -> bool:
        return view is not None and not view.is_vector and max(view.unfold(leaf).shape[-2:]) <= largest

    def init(params: Params) -> MatricesState:
        held, hole = Leaves(params), optax.MaskedNode()
        found: list[tuple[Parts | None, Any, Any]] = []
        for leaf, view in zip(held.arrays, matrix_views(params, roles), strict=True):
            zeros = jnp.zeros_like(leaf, jnp.float32)
            if view is not None and is_matrix(leaf, view):
                found.append((start(view.unfold(zeros), view.path), hole, hole))
            else:
                found.append((None, zeros, jnp.zeros_like(zeros)))
        names = list(start(jnp.zeros((1, 1)), ""))
        matrices = {n: held.tree([hole if parts is None else parts[n] for parts, _, _ in found]) for n in names}
        moments = (held.tree([one[i] for one in found]) for i in (1, 2))
        return MatricesState(jnp.zeros((), jnp.int32), matrices, *moments)

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, MatricesState]:
        if needs_params and params is None:
            raise ValueError("update: this transformation needs the parameters; pass params=.")
        held, count = Leaves(updates), jnp.asarray(optax.safe_increment(state.count))
        names, weights = list(state.matrices), held.of(params) if needs_params else [None] * len(held.arrays)
        rows = zip(*(held.of(state.matrices[n]) for n in names), strict=True) if names else [()] * len(held.arrays)
        moments = held.of(state.mu), held.of(state.nu)
        places = list(zip(held.arrays, matrix_views(updates, roles), rows, *moments, weights, strict=True))
        told: Mapping[str, Parts] = {}
        if together is not None:
            told = together(
                {
                    view.path: (view.unfold(gradient.astype(jnp.float32)), dict(zip(names, row, strict=True)))
                    for gradient, view, row, mu, _, _ in places
                    if view is not None and is_hole(mu)
                }
            )
        made, kept = [], []
        for gradient, view, row, mu, nu, param in places:
            if view is None or not is_hole(mu):
                direction, mu, nu = adam_direction(gradient, mu, nu, count, b1, b2, eps)
                made.append((vector_scale * direction).astype(gradient.dtype))
            else:
                wide = [None if v is None else view.unfold(v.astype(jnp.float32)) for v in (gradient, param)]
                assert wide[0] is not None
                at = MatrixStep(count, view.path, wide[1])
                direction, new = step(wide[0], dict(zip(names, row, strict=True)) | told.get(view.path, {}), at)
                row = tuple(placed_like(new[n], old) for n, old in zip(names, row, strict=True))
                made.append(placed_like(view.fold(direction).astype(gradient.dtype), gradient))
            kept.append((row, mu, nu))
        matrices = {n: held.kept([row[i] for row, _, _ in kept], state.matrices[n]) for i, n in enumerate(names)}
        moments = (held.kept([one[i] for one in kept], old) for i, old in ((1, state.mu), (2, state.nu)))
        return held.tree(made), MatricesState(count, matrices, *moments)

    return optax.GradientTransformation(init, update)
