"""Trion: a low-rank Muon in columns of a fixed cosine basis.

FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models (Modoranu, Safaryan,
Schultheis, Ryabinin, Chumachenko, Alistarh, 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, Role, Updates, check_choice, check_int, placed_like
from subspace_jax.linalg import (
    NEWTON_SCHULZ_COEFFICIENTS,
    FixedBasis,
    Transform,
    chosen_columns,
    newton_schulz,
    select_columns,
    wide_matmul,
)
from subspace_jax.methods.optimizers.dct_lowrank._oriented import (
    check_columns,
    is_compressed,
    oriented,
    restored,
    wide_zeros,
)
from subspace_jax.optim import Leaves, MatrixView, adam_direction, is_hole, matrix_views, with_rate


class TrionState(NamedTuple):
    """State of `scale_by_trion`: trees like the parameters, in float32.

    Attributes:
      count: steps so far, int32 scalar.
      momentum: of matrices, `[*stack, longer, shorter]`; `optax.MaskedNode` for everything else.
      mu: Adam's first moments of everything else; `optax.MaskedNode` for matrices.
      nu: second moments, likewise.
    """

    count: jax.Array
    momentum: Any
    mu: Any
    nu: Any


TrionScale = Literal["kj", "kimi", "dion", "none"]


def scale_by_trion(
    rank: int,
    *,
    momentum: float = 0.95,
    scale: TrionScale = "kj",
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_COEFFICIENTS,
    transform: Transform = "matmul",
    norm: Literal[1, 2] = 1,
    basis: FixedBasis = "dct",
    largest: int = 32000,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-10,
    vector_scale: float = 3e-4 / 0.02,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    r"""Orthogonalizes a low-rank part of the momentum, taken in columns of a cosine basis: a low-rank Muon.

    \(M \leftarrow M + G\), \(L = M Q_r\) in the chosen columns, \(M \leftarrow M - (1 - \mu)\,L Q_r^T\), so that only
    the part that was used decays, and the update is the orthogonalized \(L\), lifted. State is the momentum alone.
    Chain `optax.scale_by_learning_rate(0.02)` after it, the published rate.

    Args:
      rank: \(r\); at most the shorter side counts.
      momentum: \(\mu\).
      scale: by the sides of a matrix: "kj" \(\sqrt{\max(1, out / in)}\), "kimi" \(0.2 \sqrt{\max(out, in)}\), "dion"
        \(\sqrt{out / in}\), or "none".
      coefficients: of the Newton-Schulz steps.
      transform: "matmul", or "fft" by fast transforms of the rows.
      norm: 1 or 2, by which columns are ranked.
      basis: "dct", or "random_qr" to compare with.
      largest: matrices with a longer side than this, as embeddings, have plain Adam.
      b1: decay of the first moment of Adam, which serves everything that is not a matrix.
      b2: decay of its second moment.
      eps: added to the root of its second moment.
      vector_scale: Adam's step is multiplied by this; the published rate there is 3e-4 beside 0.02.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `rank`, `norm` and
      `largest` in `static_args`.

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: an unknown `scale`, `transform`, `norm` or `basis`, or "fft" for another basis than cosines.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.dct_lowrank.scale_by_trion(2, scale="none")
      >>> w = {"w": jnp.eye(4)}
      >>> updates, _ = optimizer.update(w, optimizer.init(w))
      >>> bool(jnp.linalg.matrix_rank(updates["w"]) == 2)
      True
    """
    check_int("scale_by_trion: rank", rank)
    check_columns("scale_by_trion", transform, norm, basis)
    factors = {
        "kj": lambda i, o: math.sqrt(max(1.0, o / i)),
        "kimi": lambda i, o: 0.2 * math.sqrt(max(i, o)),
        "dion": lambda i, o: math.sqrt(o / i),
        "none": lambda i, o: 1.0,
    }
    check_choice("scale_by_trion: scale", scale, factors)

    def init(params: Params) -> TrionState:
        held, hole = Leaves(params), optax.MaskedNode()
        found = []
        for leaf, view in zip(held.arrays, matrix_views(params, roles), strict=True):
            if is_compressed(leaf, view, largest):
                found.append((wide_zeros(oriented(view, leaf)), hole, hole))
            else:
                found.append((hole, wide_zeros(leaf), wide_zeros(leaf)))
        return TrionState(jnp.zeros((), jnp.int32), *(held.tree([parts[i] for parts in found]) for i in range(3)))

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, TrionState]:
        del params
        held, count = Leaves(updates), jnp.asarray(optax.safe_increment(state.count))
        trees = state.momentum, state.mu, state.nu
        made, kept = [], []
        states = zip(*map(held.of, trees), strict=True)
        for gradient, view, (moved, mu, nu) in zip(held.arrays, matrix_views(updates, roles), states, strict=True):
            if is_hole(moved) or view is None:
                step, mu, nu = adam_direction(gradient, mu, nu, count, b1, b2, eps)
                made.append((vector_scale * step).astype(gradient.dtype))
            else:
                step, moved = _orthogonal(gradient, view, moved)
                made.append(step)
            kept.append((moved, mu, nu))
        new = [held.kept([parts[i] for parts in kept], old) for i, old in enumerate(trees)]
        return held.tree(made), TrionState(count, *new)

    def _orthogonal(gradient: jax.Array, view: MatrixView, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = moved + oriented(view, gradient.astype(jnp.float32))
        found = select_columns(whole, min(rank, whole.shape[-1]), basis=basis, transform=transform, norm=norm)
        columns = jnp.swapaxes(chosen_columns(found.indices, whole.shape[-1], basis), -1, -2)
        lifted = wide_matmul(
            jnp.concatenate([newton_schulz(found.coordinates, coefficients), found.coordinates], axis=-2), columns
        )
        step, used = jnp.split(lifted, 2, axis=-2)
        inputs, outputs = view.unfold(gradient).shape[-2:]
        step = restored(view, factors[scale](inputs, outputs) * step, gradient)
        return step, placed_like(whole - (1 - momentum) * used, moved)

    return optax.GradientTransformation(init, update)


def trion(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    rank: int = 128,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    scale: TrionScale = "kj",
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_COEFFICIENTS,
    transform: Transform = "matmul",
    norm: Literal[1, 2] = 1,
    basis: FixedBasis = "dct",
    largest: int = 32000,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-10,
    vector_scale: float = 3e-4 / 0.02,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Trion: a low-rank Muon in columns of a cosine basis, with its learning rate; see `scale_by_trion`.

    Args:
      learning_rate: a number or a schedule; 0.02 as published.
      rank: \(r\); at most the shorter side counts.
      momentum: \(\mu\).
      weight_decay: decoupled, times the parameters.
      scale: by the sides of a matrix: "kj", "kimi", "dion" or "none".
      coefficients: of the Newton-Schulz steps.
      transform: "matmul", or "fft" by fast transforms of the rows.
      norm: 1 or 2, by which columns are ranked.
      basis: "dct", or "random_qr" to compare with.
      largest: matrices with a longer side than this, as embeddings, have Adam.
      b1: decay of the first moment of Adam, which everything that is no matrix has.
      b2: decay of the second moment of Adam.
      eps: added to the root of the second moment of Adam.
      vector_scale: Adam's step is multiplied by this; the published rate there is 3e-4 beside 0.02.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`. With
      `optax.inject_hyperparams` name `rank`, `norm` and `largest` in `static_args`.

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: an unknown `scale`, `transform`, `norm` or `basis`, or "fft" for another basis than cosines; at
        `update`, `params` is missing for the weight decay.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.trion(0.02, rank=2).init({"w": jnp.ones((6, 4))})
      >>> state[0].momentum["w"].shape
      (6, 4)
    """
    direction = scale_by_trion(
        rank,
        momentum=momentum,
        scale=scale,
        coefficients=coefficients,
        transform=transform,
        norm=norm,
        basis=basis,
        largest=largest,
        b1=b1,
        b2=b2,
        eps=eps,
        vector_scale=vector_scale,
        roles=roles,
    )
    return with_rate(direction, learning_rate, weight_decay)
