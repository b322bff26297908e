"""Heads whose classes are linear subspaces."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import check_int
from subspace_jax.manifolds import Grassmann


def grassmann_logits(features: jax.Array, subspaces: jax.Array, gamma: float = 25.0) -> jax.Array:
    r"""Returns logits that measure how much of a feature lies in each class's subspace.

    \(\gamma\,|S_i^T x| / |x|\): zero for a feature orthogonal to the subspace, \(\gamma\) for one inside it. Neither
    the length nor the sign of a feature counts, nor the basis of a subspace. Where a norm is zero its gradient is too.

    Args:
        features: \(x\), `[*batch, width]`.
        subspaces: \(S\), `[classes, width, dim]` with orthonormal columns.
        gamma: \(\gamma\), the largest logit.

    Returns:
        `[*batch, classes]` in at least float32, whatever the dtype of the features.

    Example:
        >>> import jax.numpy as jnp
        >>> classes = jnp.stack([jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]])
        >>> grassmann_logits(jnp.array([[2.0, 0.0, 0.0]]), classes).tolist()
        [[25.0, 0.0]]
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    # Divided by the largest entry first: squares of very small or large features leave the range of floats.
    largest = lax.stop_gradient(jnp.max(jnp.abs(features), -1, keepdims=True))
    features = features / jnp.where(largest == 0, 1.0, largest)
    lengths = _norm(features)[..., None]
    unit = features / jnp.where(lengths == 0, 1.0, lengths)
    return _norm(jnp.einsum("...d,cdk->...ck", gamma * unit, subspaces, precision=lax.Precision.HIGHEST))


def _norm(vectors: jax.Array) -> jax.Array:
    """Norms over the last axis, with gradient zero where they are zero."""
    squares = jnp.sum(jnp.square(vectors), -1)
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))


def draw_subspaces(key: jax.Array, num_classes: int, width: int, subspace_dim: int) -> jax.Array:
    """Returns subspaces drawn uniformly, `[classes, width, dim]` with orthonormal columns."""
    if subspace_dim > width:
        raise ValueError(
            f"GrassmannHead.subspace_dim={subspace_dim} exceeds the features' width {width}; at most their width, and "
            "well below it, since all classes become one where they are equal."
        )
    return Grassmann().random_point(key, (num_classes, width, subspace_dim))


class GrassmannHead(nn.Module):
    """A classifier head with a subspace for each class; Flax Linen. See `grassmann_logits`.

    Parameters: `subspaces` `(num_classes, width, subspace_dim)`, always float32, uniform over the Grassmannian; train
    them with `sj.methods.gcr.grassmann_sgd`, which keeps them orthonormal. An average of weights over time has to be
    brought back with `sj.manifolds.Grassmann().project`. There is no bias.

    Attributes:
        num_classes: number of logits.
        subspace_dim: dimension of the subspaces; with 1 the logit is the absolute cosine.
        gamma: the largest logit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> head = GrassmannHead(num_classes=3, subspace_dim=2)
        >>> params = head.init(jax.random.key(0), jnp.ones((4, 6)))["params"]
        >>> params["subspaces"].shape, head.apply({"params": params}, jnp.ones((4, 6))).shape
        ((3, 6, 2), (4, 3))
    """

    num_classes: int
    subspace_dim: int = 8
    gamma: float = 25.0

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns logits `[*batch, num_classes]` in float32 of features `[*batch, width]`."""
        for name in ("num_classes", "subspace_dim"):
            check_int(f"{type(self).__name__}.{name}", getattr(self, name))
        subspaces = self.param("subspaces", draw_subspaces, self.num_classes, features.shape[-1], self.subspace_dim)
        return grassmann_logits(features, subspaces, self.gamma)
