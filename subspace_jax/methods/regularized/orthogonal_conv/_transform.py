"""Adds the penalty's gradient to updates, as a transformation for optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from subspace_jax.core import (
    Params,
    PatternError,
    RoleError,
    Updates,
    is_weight,
    leaves_with_paths,
    map_with_paths,
    matches,
    nearest,
    placed_like,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.regularized.orthogonal_conv._penalty import Strides, orthogonality
from subspace_jax.optim import like_updates


def add_orthogonality(
    weight: Any, kernels: Mapping[str, Strides], *, groups: int = 1, power: Literal[1, 2] = 2
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `orthogonality` at the parameters: \(G \mapsto G + \lambda \nabla_K L_{orth}(K)\).

    Before an optimizer it is the same as the term in the loss, computed once a step whatever the number of
    micro-batches; after Adam and before the learning rate it is decoupled.

    Args:
      weight: \(\lambda\), a number; traced by `optax.inject_hyperparams`.
      kernels: strides of the convolutions to hold, by path or glob; the first match counts.
      groups: `feature_group_count` of all of them.
      power: 2, or 1 for the root.

    Returns:
      A transformation whose `update` needs `params`; structure, shapes and dtypes are kept. With
      `optax.inject_hyperparams` name `kernels`, `groups` and `power` in `static_args`.

    Raises:
      PatternError: a glob matches nothing; from `init`.
      RoleError: what it matches is no plain array `[*window, in, out]`; from `init`.
      ValueError: `update` without parameters.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 2)) / 4}}
      >>> home = sj.methods.orthogonal_conv
      >>> optimizer = optax.chain(home.add_orthogonality(0.1, {"**/kernel": 1}), optax.sgd(0.02))
      >>> state, before = optimizer.init(params), home.orthogonality(params["conv"]["kernel"])
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(home.orthogonality(params["conv"]["kernel"]) < before / 2)
      True
    """

    def strides_of(path: str) -> Strides | None:
        return next((s for pattern, s in kernels.items() if pattern == path or matches(pattern, path)), None)

    def init(params: Params) -> optax.EmptyState:
        leaves = leaves_with_paths(params)
        masked = jax.tree.leaves(params, is_leaf=_is_masked)
        for pattern in kernels if leaves and not any(map(_is_masked, masked)) else ():
            if not any(pattern == path or matches(pattern, path) for path, _ in leaves):
                found = nearest(pattern, [path for path, _ in leaves])
                raise PatternError(f"add_orthogonality: {pattern!r} matches no leaf; nearest are {found}.")
        for path, leaf in leaves:
            if strides_of(path) is not None and (is_weight(leaf) or getattr(leaf, "ndim", 3) < 3):
                came = f"{type(leaf).__name__} of shape {getattr(leaf, 'shape', None)}"
                raise RoleError(
                    f"{path}: add_orthogonality: {came}; expected a plain array [*window, in, out]. Of stand-in "
                    "weights put orthogonality(weight.materialize()) into the loss."
                )
        return optax.EmptyState()

    def update(
        updates: Updates, state: optax.OptState, params: Params = None, **extra: Any
    ) -> tuple[Updates, optax.OptState]:
        del extra
        if params is None:
            raise ValueError("add_orthogonality: update needs the parameters; pass params=.")

        def one(path: str, gradient: Any, kernel: Any) -> Any:
            strides = strides_of(path)
            if strides is None or gradient is None or not hasattr(gradient, "dtype") or not gradient.size:
                return gradient
            wide = kernel.astype(wide_dtype(kernel.dtype))
            slope = jax.grad(lambda k: orthogonality(k, strides, groups=groups, power=power))(wide)
            return placed_like((gradient + weight * slope).astype(gradient.dtype), gradient)

        return map_with_paths(one, updates, like_updates(updates, params)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_masked(value: Any) -> bool:
    return value is None or isinstance(value, optax.MaskedNode)
