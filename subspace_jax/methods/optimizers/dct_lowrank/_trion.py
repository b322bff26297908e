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

from subspace_jax.core import RankError, Role, placed_like
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
    PlainLeaf,
    is_compressed,
    oriented,
    restored,
    wide_zeros,
)
from subspace_jax.optim import matrix_views


class TrionState(NamedTuple):
    """State of `scale_by_trion`.

    Attributes:
      count: steps so far, int32 scalar.
      leaves: a tree like the parameters with a momentum `[*stack, longer, shorter]` in float32, or a `PlainLeaf`, for
        every array.
    """

    count: jax.Array
    leaves: Any


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
      A gradient transformation.

    Raises:
      RankError: `rank` is not positive.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.dct_lowrank.scale_by_trion(2, scale="none")
      >>> w = {"w": jnp.eye(4)}
      >>> updates, _ = optimizer.update(w, optimizer.init(w))
      >>> bool(jnp.linalg.matrix_rank(updates["w"]) == 2)
      True
    """
    if rank < 1:
        raise RankError(f"scale_by_trion: rank={rank}; expected at least 1.")
    factors = {
        "kj": lambda i, o: math.sqrt(max(1.0, o / i)),
        "kimi": lambda i, o: 0.2 * math.sqrt(max(i, o)),
        "dion": lambda i, o: math.sqrt(o / i),
        "none": lambda i, o: 1.0,
    }
    if scale not in factors:
        raise ValueError(f"scale_by_trion: scale={scale!r}; choose from {', '.join(factors)}.")

    def init(params: Any) -> TrionState:
        arrays, treedef = jax.tree.flatten(params)
        leaves = []
        for leaf, view in zip(arrays, matrix_views(params, roles), strict=True):
            compressed = is_compressed(leaf, view, largest)
            leaves.append(
                wide_zeros(oriented(view, leaf)) if compressed else PlainLeaf(wide_zeros(leaf), wide_zeros(leaf))
            )
        return TrionState(jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, leaves))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TrionState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        held = treedef.flatten_up_to(state.leaves)
        made, kept = [], []
        leaf: Any
        for gradient, view, leaf in zip(gradients, matrix_views(updates, roles), held, strict=True):
            wide = gradient.astype(jnp.float32)
            if isinstance(leaf, PlainLeaf) or view is None:
                mu, nu = b1 * leaf.mu + (1 - b1) * wide, b2 * leaf.nu + (1 - b2) * wide * wide
                step = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
                made.append((vector_scale * step).astype(gradient.dtype))
                kept.append(PlainLeaf(mu, nu))
                continue
            whole = leaf + oriented(view, wide)
            found = select_columns(whole, min(rank, whole.shape[-1]), basis=basis, transform=transform, norm=norm)
            columns = jnp.swapaxes(chosen_columns(found.indices, whole.shape[-1], basis), -1, -2)
            lifted = wide_matmul(
                jnp.concatenate([newton_schulz(found.coordinates, coefficients), found.coordinates], axis=-2), columns
            )
            step, used = jnp.split(lifted, 2, axis=-2)
            inputs, outputs = view.unfold(gradient).shape[-2:]
            made.append(restored(view, factors[scale](inputs, outputs) * step, gradient))
            kept.append(placed_like(whole - (1 - momentum) * used, leaf))
        return jax.tree.unflatten(treedef, made), TrionState(count, jax.tree.unflatten(treedef, kept))

    return optax.GradientTransformation(init, update)
