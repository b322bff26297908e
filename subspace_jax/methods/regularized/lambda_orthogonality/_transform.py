"""Adds the penalty's gradient to updates, as a transformation for optax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Role, Updates, leaves_with_paths, placed_like, select_paths
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.regularized.lambda_orthogonality._penalty import lambda_orthogonality_gradient
from subspace_jax.optim import MatrixView, like_updates, matrix_views, refuse_unseen

Scheduled = float | jax.Array | Callable[[Any], Any]


class AddLambdaOrthogonalityState(NamedTuple):
    """State of `add_lambda_orthogonality`.

    Attributes:
      count: number of steps, an int32 scalar.
    """

    count: jax.Array


def add_lambda_orthogonality(
    weight: Scheduled = 1.0,
    lam: Scheduled | None = None,
    alpha: Scheduled = 1.0,
    *,
    select: Callable[[str, Any], bool] | str | Iterable[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `sj.lambda_orthogonality` at the parameters, as `optax.add_decayed_weights` adds decay.

    \(G \mapsto G + w\,\nabla_W\,\sigma(\alpha (x - \lambda))\,x\) with \(x = \|W^T W - I\|_F\): matrices are free up
    to a distance \(\lambda\) from orthogonality and pulled back beyond. Before an optimizer it is the same as the term
    in the loss; after Adam and before the learning rate it is decoupled.

    Of stand-in weights every factor that learns is held on its own, LoRA's `a` near orthonormal columns and `b` near
    orthonormal rows; to hold the array that they stand for, put `sj.lambda_orthogonality` of the weight into the loss.
    Vectors, and arrays that are not known to be matrices, pass as they are. Embedding tables are matrices: leave them
    out with `select`.

    Args:
      weight: \(w\), a number or a schedule, as are `lam` and `alpha`; published: 1.
      lam: \(\lambda\); \(0.375 \sqrt{n}\) if None, with n the smaller side of each matrix, the published 12 at 1024.
      alpha: \(\alpha\), steepness of the gate.
      select: globs or a predicate of path and array that choose the matrices to hold; every one if None. With
        `optax.inject_hyperparams` name a predicate in `static_args`, or it is taken for a schedule.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Returns:
      A transformation whose `update` needs `params`; structure, shapes and dtypes are kept.

    Raises:
      ValueError: `update` without parameters, or `alpha` is not a positive number.
      PatternError: a glob matches nothing.
      RoleError: a selected array is not known to be a matrix.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> params = {"kernel": 2 * jnp.eye(2), "bias": jnp.ones(2)}
      >>> penalty = sj.methods.lambda_orthogonality.add_lambda_orthogonality(1.0, lam=0.5)
      >>> optimizer = optax.chain(penalty, optax.sgd(0.1))
      >>> state = optimizer.init(params)
      >>> for _ in range(30):
      ...     updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(abs(params["kernel"] - jnp.eye(2)).max() < 0.3), params["bias"].tolist()
      (True, [1.0, 1.0])
    """

    def wanted(params: Params) -> set[str]:
        known = [path for path, _ in leaves_with_paths(params)]
        # optax initializes with a tree without leaves to tell what of a state is like the parameters.
        return set(known if select is None or not known else select_paths(params, select))

    def init(params: Params) -> AddLambdaOrthogonalityState:
        if select is not None:
            refuse_unseen(params, matrix_views(params, roles), wanted(params))
        return AddLambdaOrthogonalityState(jnp.zeros([], jnp.int32))

    def update(
        updates: Updates, state: OptState, params: Params = None, **extra: Any
    ) -> tuple[Updates, AddLambdaOrthogonalityState]:
        del extra
        if params is None:
            raise ValueError(
                "add_lambda_orthogonality: update needs params; call optimizer.update(gradients, state, params)."
            )
        now = [value(state.count) if callable(value) else value for value in (weight, lam, alpha)]
        leaves, treedef = jax.tree.flatten(updates)
        # A hole among the updates is one among the parameters too: what has no gradient is not trained.
        held = like_updates(updates, params)
        chosen = wanted(held)
        found = [
            _added(leaf, kernel, view, *now) if view is not None and view.path in chosen else leaf
            for leaf, kernel, view in zip(leaves, jax.tree.leaves(held), matrix_views(held, roles), strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(treedef, found), AddLambdaOrthogonalityState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def _added(update: jax.Array, kernel: jax.Array, view: MatrixView, weight: Any, lam: Any, alpha: Any) -> jax.Array:
    if view.is_vector:
        return update
    pull = view.fold(lambda_orthogonality_gradient(view.unfold(kernel), lam, alpha))
    wide = update.astype(wide_dtype(update.dtype))
    return (wide + weight * placed_like(pull, update)).astype(update.dtype)
