"""The head for Flax NNX, in a file of its own: NNX takes long to import."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from subspace_jax.core import check_int
from subspace_jax.methods.systems.gcr._head import draw_subspaces, grassmann_logits


class NNXGrassmannHead(nnx.Module):
    """`GrassmannHead` for Flax NNX.

    Args:
        width: of the features.
        num_classes: number of logits.
        subspace_dim: dimension of the subspaces.
        gamma: the largest logit.
        rngs: draws the subspaces, with its stream `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NNXGrassmannHead(6, num_classes=3, subspace_dim=2, rngs=nnx.Rngs(0))(jnp.ones((4, 6))).shape
        (4, 3)
    """

    def __init__(
        self, width: int, num_classes: int, subspace_dim: int = 8, gamma: float = 25.0, *, rngs: nnx.Rngs
    ) -> None:
        self.num_classes, self.subspace_dim, self.gamma = num_classes, subspace_dim, gamma
        for name in ("num_classes", "subspace_dim"):
            check_int(f"{type(self).__name__}.{name}", getattr(self, name))
        self.subspaces = nnx.Param(draw_subspaces(rngs.params(), num_classes, width, subspace_dim))

    def __call__(self, features: jax.Array) -> Any:
        """Returns logits `[*batch, num_classes]` in float32 of features `[*batch, width]`."""
        return grassmann_logits(features, self.subspaces[...], self.gamma)
