"""Singular value decompositions of changes, through their factors where they have some."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import product_svd, truncated_svd, whole_matrices, wide_matmul
from subspace_jax.merging._change import Change, Factored, formed
from subspace_jax.merging._site import Site


class Thin(NamedTuple):
    r"""A thin decomposition \(U\,\mathrm{diag}(s)\,V^T\) of stacked matrices.

    Attributes:
      u: `[*stack, in, k]`.
      s: `[*stack, k]`, largest first.
      v: `[*stack, out, k]`.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array


def thin_svd(change: Change, site: Site, rank: int | None = None) -> Thin:
    """Returns the leading triples of a change; of one in factors without forming it.

    Args:
      change: what is decomposed.
      site: its leaf, which has a role.
      rank: how many triples; as many as there can be if None.
    """
    if isinstance(change, Factored) and change.gain is None:
        u, s, vt = product_svd(change.a, change.b)
    else:
        matrix = site.matrix_of(formed(change, site.base))
        u, s, vt = truncated_svd(matrix, min(matrix.shape[-2:]))
    found = Thin(u, s, jnp.swapaxes(vt, -1, -2))
    return found if rank is None else Thin(*(part[..., :rank] for part in found))


@jax.jit
def polar(columns: jax.Array) -> jax.Array:
    r"""Returns the orthogonal polar factor of stacked matrices: \(X Z^T\) of \(X Y Z^T\).

    Args:
      columns: `[*stack, m, n]` with \(m \ge n\).
    """
    x, _, zt = jnp.linalg.svd(whole_matrices(columns), full_matrices=False)
    return wide_matmul(x, zt)
