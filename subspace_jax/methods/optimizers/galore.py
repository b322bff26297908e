"""GaLore: runs Adam inside the leading subspace of each gradient, refreshed periodically."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from subspace_jax.core import Role, register
from subspace_jax.optim import Decomposition, Moments, SideRule, in_subspace, with_rate

__all__ = [
    "galore",
]


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    scale: Any = 0.25,
    every: int = 200,
    side: SideRule = "shorter",
    moments: Moments = "carry",
    decomposition: Decomposition = "exact",
    seed: int = 0,
    select: Callable[[str, Any], bool] | str | Iterable[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adam in the leading singular subspace of each gradient, with the published constants.

    \(W \mapsto W - \eta\,(\alpha\,U\,\mathrm{Adam}(U^T G) + \lambda W)\) with the subspace on the shorter side, found
    anew every 200 steps. Moments are `rank` times the longer side per matrix instead of the whole matrix.

    Published for pre-training: a rate of 0.01 with \(\alpha\) = 0.25, and ranks of 128, 256, 256 and 512 for models of
    60, 130, 350 and 1000 million parameters.

    Args:
      learning_rate: \(\eta\), a number or a schedule.
      rank: of the subspaces.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: \(\lambda\), decoupled and in full space.
      scale: \(\alpha\).
      every: steps from one decomposition to the next.
      side: which side the subspaces lie in: the "shorter" or the "longer" one, or "in" or "out" of all.
      moments: what becomes of moments as the basis changes: "carry", "reset" or "transport"; see `in_subspace`.
      decomposition: "exact", or "randomized" for a large matrix and small rank.
      seed: of the randomized decomposition.
      select: globs or a predicate of path and array that choose which matrices get a subspace; every one if None.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`; without it those pass.

    Returns:
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`. With
      `optax.inject_hyperparams` name `rank`, `every`, `seed` and a predicate `select` in `static_args`.

    Raises:
      RankError: `rank` or `every` is not a positive integer.
      PatternError: a glob matches nothing.
      ValueError: an unknown `side`, `moments` or `decomposition`; at `update`, `params` is missing for the weight
        decay.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.galore(1e-2, rank=2, select="kernel").init({"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)})
      >>> state[0].inner.nu["kernel"].shape, state[0].inner.nu["bias"].shape
      ((2, 9), (9,))
    """
    subspace = in_subspace(
        optax.scale_by_adam(b1, b2, eps),
        rank=rank,
        every=every,
        side=side,
        moments=moments,
        scale=scale,
        decomposition=decomposition,
        seed=seed,
        select=select,
        roles=roles,
    )
    return with_rate(subspace, learning_rate, weight_decay)


register(
    __name__,
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    authors="Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
    year=2024,
    kinds=("transformation",),
    uses=("in_subspace",),
    experiment="projected_gradients",
    use_for="Full-rank weights under Adam with the moments of a low rank.",
    not_for=(
        "A stream of tasks: projecting the gradient alone does not keep old tasks. For SVD-free steps see DCT- AdamW."
    ),
)
