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

from subspace_jax.core import OptState, Params, Role, Updates, check_int, placed_like
from subspace_jax.linalg import FixedBasis, Transform, chosen_columns, select_columns, wide_matmul
from subspace_jax.methods.optimizers.dct_lowrank._oriented import (
    check_columns,
    is_compressed,
    oriented,
    restored,
    wide_zeros,
)
from subspace_jax.optim import Leaves, MatrixView, is_hole, matrix_views, with_rate
from subspace_jax.weights import migrate_entries


class DctAdamState(NamedTuple):
    """State of `scale_by_dct_adam`: trees like the parameters.

    Compressed matrices are oriented so that the shorter side comes last; all float32 but counts and indices.

    Attributes:
      count: steps so far, int32 scalar.
      mu: first moments, `[*stack, longer, rank]` in the coordinates of the columns in use; of an array that is not
        compressed, its shape.
      nu: second moments, likewise.
      indices: the columns in use, `[*stack, rank]` int32; `optax.MaskedNode` for arrays that are not compressed.
      error: what the coordinates left out so far, `[*stack, longer, shorter]`; `optax.MaskedNode` for arrays that are
        not compressed, and without error feedback.
    """

    count: jax.Array
    mu: Any
    nu: Any
    indices: Any
    error: Any


class _Leaf(NamedTuple):
    """State of one compressed array; see `DctAdamState`."""

    mu: jax.Array
    nu: jax.Array
    indices: jax.Array
    error: Any


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
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `rank`, `every`,
      `norm` and `largest` in `static_args`.

    Raises:
      RankError: `rank` or `every` is not a positive integer.
      ValueError: an unknown `transform`, `norm` or `basis`, or "fft" for another basis than cosines.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.dct_lowrank.scale_by_dct_adam(2, error_feedback=False)
      >>> state = optimizer.init({"w": jnp.ones((6, 4)), "b": jnp.ones(4)})
      >>> state.mu["w"].shape, state.mu["b"].shape
      ((6, 2), (4,))
    """
    check_int("scale_by_dct_adam: rank", rank)
    check_int("scale_by_dct_adam: every", every)
    check_columns("scale_by_dct_adam", transform, norm, basis)
    options: dict[str, Any] = {"basis": basis, "transform": transform, "norm": norm}

    def init(params: Params) -> DctAdamState:
        held = Leaves(params)
        found = []
        for leaf, view in zip(held.arrays, matrix_views(params, roles), strict=True):
            if not is_compressed(leaf, view, largest):
                found.append((wide_zeros(leaf), wide_zeros(leaf), optax.MaskedNode(), optax.MaskedNode()))
                continue
            whole = wide_zeros(oriented(view, leaf))
            # A sum over the shorter side leaves the longer one split over devices as it was.
            line = jnp.sum(whole, axis=-1, keepdims=True)
            low = jnp.broadcast_to(line, (*whole.shape[:-1], min(rank, whole.shape[-1])))
            indices = jnp.broadcast_to(jnp.arange(low.shape[-1], dtype=jnp.int32), (*low.shape[:-2], low.shape[-1]))
            found.append((low, jnp.copy(low), indices, whole if error_feedback else optax.MaskedNode()))
        trees = {name: held.tree([parts[i] for parts in found]) for i, name in enumerate(_Leaf._fields)}
        return DctAdamState(count=jnp.zeros((), jnp.int32), **trees)

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, DctAdamState]:
        del params
        held = Leaves(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        corrections = 1 - b1**count, 1 - b2**count
        trees = state.mu, state.nu, state.indices, state.error
        made, kept = [], []
        leaves = [_Leaf(*parts) for parts in zip(*map(held.of, trees), strict=True)]
        for gradient, view, leaf in zip(held.arrays, matrix_views(updates, roles), leaves, strict=True):
            if is_hole(leaf.indices) or view is None:
                moments, step = _adam(leaf.mu, leaf.nu, gradient.astype(jnp.float32))
                made.append(step(corrections).astype(gradient.dtype))
                kept.append(_Leaf(moments[0], moments[1], leaf.indices, leaf.error))
            else:
                step, leaf = _compressed(gradient, view, leaf, state.count, corrections)
                made.append(step)
                kept.append(leaf)
        new = {
            name: held.kept([getattr(leaf, name) for leaf in kept], old)
            for name, old in zip(_Leaf._fields, trees, strict=True)
        }
        return held.tree(made), DctAdamState(count=count, **new)

    def _adam(mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> Any:
        mu, nu = b1 * mu + (1 - b1) * gradient, b2 * nu + (1 - b2) * gradient * gradient
        return (mu, nu), lambda c: (mu / c[0]) / (jnp.sqrt(nu / c[1]) + eps)

    def _compressed(
        gradient: jax.Array, view: MatrixView, leaf: _Leaf, count: jax.Array, corrections: Any
    ) -> tuple[jax.Array, _Leaf]:
        whole = oriented(view, gradient).astype(jnp.float32)
        whole = whole if is_hole(leaf.error) else whole + leaf.error
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
        error = leaf.error if is_hole(leaf.error) else whole - wide_matmul(low, columns, split=(-2, None))
        lifted = wide_matmul(step(corrections), columns, split=(-2, None))
        new = _Leaf(mu, nu, indices, error)
        return restored(view, lifted, gradient), jax.tree.map(placed_like, new, leaf)

    return optax.GradientTransformation(init, update)


def dct_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    every: int = 1,
    rotate: bool = True,
    error_feedback: bool = True,
    transform: Transform = "matmul",
    norm: Literal[1, 2] = 1,
    basis: FixedBasis = "dct",
    largest: int = 32000,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns DCT-AdamW: Adam in the columns of a cosine basis that hold most of each gradient.

    \(W \mapsto W - \eta\,(\mathrm{Adam}(B Q_r)\,Q_r^T + \lambda W)\); see `scale_by_dct_adam`.

    Args:
      learning_rate: \(\eta\), a number or a schedule.
      rank: \(r\); at most the shorter side counts.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      weight_decay: \(\lambda\), decoupled and in full space.
      every: steps between two choices of columns.
      rotate: move the moments along with their columns.
      error_feedback: add what the columns left out to the next gradient.
      transform: "matmul", or "fft" by fast transforms of the rows.
      norm: 1 or 2, by which columns are ranked.
      basis: "dct", or "random_qr" to compare with.
      largest: matrices with a longer side than this, as embeddings, have plain Adam.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`. With
      `optax.inject_hyperparams` name `rank`, `every`, `norm` and `largest` in `static_args`.

    Raises:
      RankError: `rank` or `every` is not a positive integer.
      ValueError: an unknown `transform`, `norm` or `basis`, or "fft" for another basis than cosines; at `update`,
        `params` is missing for the weight decay.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.dct_adam(1e-3, rank=2).init({"w": jnp.ones((6, 4))})
      >>> state[0].mu["w"].shape
      (6, 2)
    """
    direction = scale_by_dct_adam(
        rank,
        b1=b1,
        b2=b2,
        eps=eps,
        every=every,
        rotate=rotate,
        error_feedback=error_feedback,
        transform=transform,
        norm=norm,
        basis=basis,
        largest=largest,
        roles=roles,
    )
    return with_rate(direction, learning_rate, weight_decay)
