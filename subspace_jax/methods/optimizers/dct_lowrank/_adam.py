"""DCT-AdamW: low-rank Adam with columns of a fixed cosine basis in place of an SVD.

FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models (Modoranu, Safaryan,
Schultheis, Ryabinin, Chumachenko, Alistarh, 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from subspace_jax.core import RankError, Role, placed_like
from subspace_jax.linalg import FixedBasis, Transform, chosen_columns, select_columns, wide_matmul
from subspace_jax.methods.optimizers.dct_lowrank._oriented import (
    PlainLeaf,
    is_compressed,
    oriented,
    restored,
    wide_zeros,
)
from subspace_jax.optim import MatrixView, matrix_views
from subspace_jax.weights import migrate_entries


class DctLeaf(NamedTuple):
    """State of one compressed array; matrices are oriented so that the shorter side comes last.

    Attributes:
      indices: the columns in use, `[*stack, rank]` int32.
      mu: first moment in their coordinates, `[*stack, longer, rank]` in float32.
      nu: second moment, likewise.
      error: what the coordinates left out so far, `[*stack, longer, shorter]` in float32; None without error feedback.
    """

    indices: jax.Array
    mu: jax.Array
    nu: jax.Array
    error: jax.Array | None


class DctAdamState(NamedTuple):
    """State of `scale_by_dct_adam`.

    Attributes:
      count: steps so far, int32 scalar.
      leaves: a tree like the parameters with a `DctLeaf` or `PlainLeaf` for every array.
    """

    count: jax.Array
    leaves: Any


def scale_by_dct_adam(
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    every: int = 1,
    rotate: bool = True,
    error_feedback: bool = True,
    transform: Transform = "matmul",
    norm: Literal[1, 2] = 1,
    basis: FixedBasis = "dct",
    largest: int = 32000,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    r"""Runs Adam in the few columns of a cosine basis that hold most of the gradient.

    With the gradient as \(B\) `[N, n]`, \(n\) the shorter side: the \(r\) columns of largest \(\|(B Q)_{:,j}\|\) give
    \(g = B Q_r\); Adam runs on \(g\), and its step is lifted by \(Q_r^T\). No decomposition, and of the subspace only
    \(r\) indices are kept. The moments of columns that stay chosen move along; new ones start at zero, so their first
    step is \((1 - \beta_1) / \sqrt{1 - \beta_2}\), 3.2 times as long as others'.

    State: \(2 N r + r\) values a matrix (and \(N n\) with error feedback) against Adam's \(2 N n\). Weight decay and
    learning rate are chained after it.

    Args:
      rank: \(r\); at most the shorter side counts.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      every: steps between two choices of columns.
      rotate: move the moments along with their columns. Without it they are mixed up whenever the choice changes,
        which nearly stops training where `every` is small.
      error_feedback: add what the columns left out to the next gradient.
      transform: "matmul", or "fft" by fast transforms of the rows.
      norm: 1 or 2, by which columns are ranked.
      basis: "dct", or "random_qr" to compare with.
      largest: matrices with a longer side than this, as embeddings, have plain Adam.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A gradient transformation.

    Raises:
      RankError: `rank` or `every` is not positive.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.dct_lowrank.scale_by_dct_adam(2, error_feedback=False)
      >>> state = optimizer.init({"w": jnp.ones((6, 4)), "b": jnp.ones(4)})
      >>> state.leaves["w"].mu.shape, state.leaves["b"].mu.shape
      ((6, 2), (4,))
    """
    if rank < 1 or every < 1:
        raise RankError(f"scale_by_dct_adam: rank={rank}, every={every}; expected at least 1.")
    options: dict[str, Any] = {"basis": basis, "transform": transform, "norm": norm}

    def init(params: Any) -> DctAdamState:
        arrays, treedef = jax.tree.flatten(params)
        leaves = []
        for leaf, view in zip(arrays, matrix_views(params, roles), strict=True):
            if not is_compressed(leaf, view, largest):
                leaves.append(PlainLeaf(wide_zeros(leaf), wide_zeros(leaf)))
                continue
            whole = wide_zeros(oriented(view, leaf))
            # A sum over the shorter side leaves the longer one split over devices as it was.
            line = jnp.sum(whole, axis=-1, keepdims=True)
            low = jnp.broadcast_to(line, (*whole.shape[:-1], min(rank, whole.shape[-1])))
            indices = jnp.broadcast_to(jnp.arange(low.shape[-1], dtype=jnp.int32), (*low.shape[:-2], low.shape[-1]))
            leaves.append(DctLeaf(indices, low, jnp.copy(low), whole if error_feedback else None))
        return DctAdamState(jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, leaves))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, DctAdamState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        corrections = 1 - b1**count, 1 - b2**count
        held = treedef.flatten_up_to(state.leaves)
        made, kept = [], []
        for gradient, view, leaf in zip(gradients, matrix_views(updates, roles), held, strict=True):
            if isinstance(leaf, PlainLeaf) or view is None:
                moments, step = _adam(leaf.mu, leaf.nu, gradient.astype(jnp.float32))
                made.append(step(corrections).astype(gradient.dtype))
                kept.append(PlainLeaf(*moments))
            else:
                step, leaf = _compressed(gradient, view, leaf, state.count, corrections)
                made.append(step)
                kept.append(leaf)
        return jax.tree.unflatten(treedef, made), DctAdamState(count, jax.tree.unflatten(treedef, kept))

    def _adam(mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> Any:
        mu, nu = b1 * mu + (1 - b1) * gradient, b2 * nu + (1 - b2) * gradient * gradient
        return (mu, nu), lambda c: (mu / c[0]) / (jnp.sqrt(nu / c[1]) + eps)

    def _compressed(
        gradient: jax.Array, view: MatrixView, leaf: DctLeaf, count: jax.Array, corrections: Any
    ) -> tuple[jax.Array, DctLeaf]:
        whole = oriented(view, gradient).astype(jnp.float32)
        whole = whole if leaf.error is None else whole + leaf.error
        size = whole.shape[-1]

        def choose() -> tuple[jax.Array, jax.Array]:
            found = select_columns(whole, leaf.indices.shape[-1], **options)
            return found.indices, found.coordinates

        def stay() -> tuple[jax.Array, jax.Array]:
            columns = chosen_columns(leaf.indices, size, basis)
            return leaf.indices, wide_matmul(whole, columns, split=(-2, None))

        indices, low = choose() if every == 1 else lax.cond(count % every == 0, choose, stay)
        mu, nu = leaf.mu, leaf.nu
        if rotate:
            # Both bases are columns of one orthonormal matrix: the change between them is a part of a permutation.
            rows = leaf.indices[..., None, :], indices[..., None, :]
            mu, nu = migrate_entries(mu, *rows), migrate_entries(nu, *rows)
        (mu, nu), step = _adam(mu, nu, low)
        columns = jnp.swapaxes(chosen_columns(indices, size, basis), -1, -2)
        error = None if leaf.error is None else whole - wide_matmul(low, columns, split=(-2, None))
        lifted = wide_matmul(step(corrections), columns, split=(-2, None))
        new = DctLeaf(indices, mu, nu, error)
        return restored(view, lifted, gradient), jax.tree.map(placed_like, new, leaf)

    return optax.GradientTransformation(init, update)
