"""GaLore: runs Adam inside the leading subspace of each gradient, refreshed now and then."""

from __future__ import annotations

from typing import Any

import optax

from subspace_jax.core import register
from subspace_jax.optim import in_subspace

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
    **options: Any,
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
      options: of `in_subspace`: `every`, `side`, `moments`, `decomposition`, `select`, `roles`.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.galore(1e-2, rank=2, select="kernel").init({"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)})
      >>> state[0].inner.nu["kernel"].shape, state[0].inner.nu["bias"].shape
      ((2, 9), (9,))
    """
    parts: list[Any] = [in_subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, scale=scale, **options)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


register(
    __name__,
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    authors="Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
    year=2024,
    kinds=("transformation",),
    uses=("in_subspace",),
    experiment="projected_gradients",
)
