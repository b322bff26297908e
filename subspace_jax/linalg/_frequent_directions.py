"""Frequent Directions: a sketch of a growing set of columns."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.linalg._sharding import whole_matrices
from subspace_jax.linalg._svd import truncated_svd


def frequent_directions(
    sketch: Float[Array, "*stack m r"], columns: Float[Array, "*stack m n"]
) -> Float[Array, "*stack m r"]:
    r"""Adds columns to a sketch of fixed size: \(S S^T \approx \sum C C^T\), from below.

    Args:
      sketch: \(S\), `[*stack, m, r]`; zeros to begin with.
      columns: \(C\), `[*stack, m, n]`, n at most r.

    Returns:
      `[*stack, m, r]`, orthogonal columns of falling length.

    References:
      Ghashami, Liberty, Phillips, Woodruff, Frequent Directions: Simple and Deterministic Matrix Sketching, 2016.
    """
    width = sketch.shape[-1]
    u, s, _ = truncated_svd(
        jnp.concatenate([whole_matrices(sketch), whole_matrices(columns)], axis=-1),
        min(sketch.shape[-2], width + columns.shape[-1]),
    )
    squares = jnp.square(s)
    dropped = squares[..., width, None] if s.shape[-1] > width else 0.0
    kept = jnp.sqrt(jnp.maximum(squares[..., :width] - dropped, 0.0))
    return u[..., :width] * kept[..., None, :]
