"""DCT-AdamW and Trion: low-rank optimisers with columns of a fixed cosine basis in place of an SVD.

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
from jax import lax

from subspace_jax.core import RankError, Role, Source, register
from subspace_jax.linalg import FixedBasis, Transform, chosen_columns, select_columns, wide_matmul
from subspace_jax.optim._matrices import Matrices, views


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


class PlainLeaf(NamedTuple):
    """State of one array that is not compressed: Adam's moments, of its shape, in float32."""

    mu: jax.Array
    nu: jax.Array


class DctAdamState(NamedTuple):
    """State of `scale_by_dct_adam`.

    Attributes:
      count: steps so far, int32 scalar.
      leaves: a `DctLeaf` or `PlainLeaf` for every array.
    """

    count: jax.Array
    leaves: tuple[DctLeaf | PlainLeaf, ...]


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
    r"""Runs Adam in the few columns of a cosine basis that the gradient has most of itself in.

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
      >>> state = sj.scale_by_dct_adam(2, error_feedback=False).init({"w": jnp.ones((6, 4)), "b": jnp.ones(4)})
      >>> state.leaves[1].mu.shape, state.leaves[0].mu.shape
      ((6, 2), (4,))

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
      Models, 2025.
    """
    if rank < 1 or every < 1:
        raise RankError(f"scale_by_dct_adam: rank={rank}, every={every}; expected at least 1.")
    options: dict[str, Any] = {"basis": basis, "transform": transform, "norm": norm}

    def init(params: Any) -> DctAdamState:
        leaves = []
        for leaf, view in zip(jax.tree.leaves(params), views(params, roles), strict=True):
            if not _is_compressed(leaf, view, largest):
                leaves.append(PlainLeaf(_zeros(leaf), _zeros(leaf)))
                continue
            oriented = _zeros(_oriented(view, leaf))
            low = oriented[..., : min(rank, oriented.shape[-1])]
            indices = jnp.broadcast_to(jnp.arange(low.shape[-1], dtype=jnp.int32), (*low.shape[:-2], low.shape[-1]))
            leaves.append(DctLeaf(indices, low, low, oriented if error_feedback else None))
        return DctAdamState(jnp.zeros((), jnp.int32), tuple(leaves))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, DctAdamState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        corrections = 1 - b1**count, 1 - b2**count
        made, kept = [], []
        for gradient, view, leaf in zip(gradients, views(updates, roles), state.leaves, strict=True):
            if isinstance(leaf, PlainLeaf) or view is None:
                moments, step = _adam(leaf.mu, leaf.nu, gradient.astype(jnp.float32))
                made.append(step(corrections).astype(gradient.dtype))
                kept.append(PlainLeaf(*moments))
            else:
                step, leaf = _compressed(gradient, view, leaf, state.count, corrections)
                made.append(step)
                kept.append(leaf)
        return jax.tree.unflatten(treedef, made), DctAdamState(count, tuple(kept))

    def _adam(mu: jax.Array, nu: jax.Array, gradient: jax.Array) -> Any:
        mu, nu = b1 * mu + (1 - b1) * gradient, b2 * nu + (1 - b2) * gradient * gradient
        return (mu, nu), lambda c: (mu / c[0]) / (jnp.sqrt(nu / c[1]) + eps)

    def _compressed(
        gradient: jax.Array, view: Matrices, leaf: DctLeaf, count: jax.Array, corrections: Any
    ) -> tuple[jax.Array, DctLeaf]:
        whole = _oriented(view, gradient).astype(jnp.float32)
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
            mu, nu = _moved((mu, nu), leaf.indices, indices)
        (mu, nu), step = _adam(mu, nu, low)
        columns = jnp.swapaxes(chosen_columns(indices, size, basis), -1, -2)
        error = None if leaf.error is None else whole - wide_matmul(low, columns, split=(-2, None))
        lifted = wide_matmul(step(corrections), columns, split=(-2, None))
        return _restored(view, lifted, gradient), DctLeaf(indices, mu, nu, error)

    return optax.GradientTransformation(init, update)


def _moved(moments: tuple[jax.Array, jax.Array], old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments in the order of new columns: those that stay keep theirs, the others start at zero.

    Both bases are columns of one orthonormal matrix, so the change between them is a part of a permutation.
    """
    place = jax.vmap(jnp.searchsorted) if old.ndim > 1 else jnp.searchsorted
    stack = old.shape[:-1]
    flat = place(old.reshape(-1, old.shape[-1]), new.reshape(-1, new.shape[-1])) if old.ndim > 1 else place(old, new)
    found = jnp.clip(flat.reshape(*stack, -1), 0, old.shape[-1] - 1)
    stays = jnp.take_along_axis(old, found, axis=-1) == new

    def move(moment: jax.Array) -> jax.Array:
        taken = jnp.take_along_axis(moment, found[..., None, :], axis=-1)
        return jnp.where(stays[..., None, :], taken, 0.0)

    return move(moments[0]), move(moments[1])


class TrionState(NamedTuple):
    """State of `scale_by_trion`.

    Attributes:
      count: steps so far, int32 scalar.
      leaves: a momentum `[*stack, longer, shorter]` in float32, or a `PlainLeaf`, for every array.
    """

    count: jax.Array
    leaves: tuple[jax.Array | PlainLeaf, ...]


TrionScale = Literal["kj", "kimi", "dion", "none"]

# Newton-Schulz of five steps with coefficients of their own, which orthogonalise further than one triple for all.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def scale_by_trion(
    rank: int,
    *,
    momentum: float = 0.95,
    scale: TrionScale = "kj",
    coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS,
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
    r"""Orthogonalises a low-rank part of the momentum, taken in columns of a cosine basis: a low-rank Muon.

    \(M \leftarrow M + G\), \(L = M Q_r\) in the chosen columns, \(M \leftarrow M - (1 - \mu)\,L Q_r^T\), so that only
    the part that was used decays, and the update is the orthogonalised \(L\), lifted. State is the momentum alone.
    Chain `optax.scale_by_learning_rate(0.02)` after it, the published rate.

    Args:
      rank: \(r\); at most the shorter side counts.
      momentum: \(\mu\).
      scale: by the sides of a matrix: "kj" \(\sqrt{\max(1, out / in)}\), "kimi" \(0.2 \sqrt{\max(out, in)}\), "dion"
        \(\sqrt{out / in}\), or "none".
      coefficients: of the Newton-Schulz steps.
      transform: as for `scale_by_dct_adam`, and so are `norm`, `basis` and `largest`.
      norm: see there.
      basis: see there.
      largest: see there.
      b1: of Adam, which everything that is no matrix has.
      b2: likewise.
      eps: likewise.
      vector_scale: Adam's step is multiplied by this; the published rate there is 3e-4 beside 0.02.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A gradient transformation.

    Raises:
      RankError: `rank` is not positive.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.scale_by_trion(2, scale="none")
      >>> w = {"w": jnp.eye(4)}
      >>> updates, _ = optimizer.update(w, optimizer.init(w))
      >>> bool(jnp.linalg.matrix_rank(updates["w"]) == 2)
      True

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
      Models, 2025.
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
        leaves = []
        for leaf, view in zip(jax.tree.leaves(params), views(params, roles), strict=True):
            compressed = _is_compressed(leaf, view, largest)
            leaves.append(_zeros(_oriented(view, leaf)) if compressed else PlainLeaf(_zeros(leaf), _zeros(leaf)))
        return TrionState(jnp.zeros((), jnp.int32), tuple(leaves))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TrionState]:
        del params
        gradients, treedef = jax.tree.flatten(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        made, kept = [], []
        leaf: Any
        for gradient, view, leaf in zip(gradients, views(updates, roles), state.leaves, strict=True):
            wide = gradient.astype(jnp.float32)
            if isinstance(leaf, PlainLeaf) or view is None:
                mu, nu = b1 * leaf.mu + (1 - b1) * wide, b2 * leaf.nu + (1 - b2) * wide * wide
                step = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
                made.append((vector_scale * step).astype(gradient.dtype))
                kept.append(PlainLeaf(mu, nu))
                continue
            whole = leaf + _oriented(view, wide)
            found = select_columns(whole, min(rank, whole.shape[-1]), basis=basis, transform=transform, norm=norm)
            columns = jnp.swapaxes(chosen_columns(found.indices, whole.shape[-1], basis), -1, -2)
            lifted = wide_matmul(
                jnp.concatenate([newton_schulz(found.coordinates, coefficients), found.coordinates], axis=-2), columns
            )
            step, used = jnp.split(lifted, 2, axis=-2)
            inputs, outputs = view.unfold(gradient).shape[-2:]
            made.append(_restored(view, factors[scale](inputs, outputs) * step, gradient))
            kept.append(whole - (1 - momentum) * used)
        return jax.tree.unflatten(treedef, made), TrionState(count, tuple(kept))

    return optax.GradientTransformation(init, update)


def newton_schulz(matrix: jax.Array, coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS) -> jax.Array:
    r"""Returns a matrix with the singular vectors of the given one and singular values near 1, by products alone.

    \(X \leftarrow a X + (b\,Y + c\,Y^2)\,X\) with \(Y = X X^T\), from \(X / \|X\|\). A matrix of zeros stays zero.

    Args:
      matrix: `[*stack, m, n]`.
      coefficients: \((a, b, c)\) of every step.

    Example:
      >>> import jax.numpy as jnp
      >>> bool(jnp.allclose(newton_schulz(jnp.diag(jnp.array([3.0, 1.0]))), jnp.eye(2), atol=0.4))
      True
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for a, b, c in coefficients:
        gram = wide_matmul(x, jnp.swapaxes(x, -1, -2), split=(-2, None))
        x = a * x + wide_matmul(b * gram + c * wide_matmul(gram, gram, split=(-2, None)), x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _is_compressed(leaf: Any, view: Matrices | None, largest: int) -> bool:
    return view is not None and not view.is_vector and max(view.unfold(leaf).shape[-2:]) <= largest


def _oriented(view: Matrices | None, array: jax.Array) -> jax.Array:
    """The array's matrices with the shorter side last; of equal sides that is the inputs' one."""
    assert view is not None
    matrix = view.unfold(array)
    return jnp.swapaxes(matrix, -1, -2) if matrix.shape[-2] <= matrix.shape[-1] else matrix


def _restored(view: Matrices, oriented: jax.Array, like: jax.Array) -> jax.Array:
    """The array of oriented matrices; the inverse of `_oriented`."""
    matrix_shape = view.unfold(like).shape
    matrix = jnp.swapaxes(oriented, -1, -2) if matrix_shape[-2] <= matrix_shape[-1] else oriented
    return view.fold(matrix).astype(like.dtype)


def _zeros(array: jax.Array) -> jax.Array:
    return jnp.zeros_like(array, jnp.float32)


register(
    Source(
        name="dct_adam",
        title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
        authors="Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh",
        year=2025,
        public=("scale_by_dct_adam", "scale_by_trion"),
        experiment="dct_lowrank",
        claim="A few columns of a cosine basis serve low-rank Adam as well as an SVD that is seldom refreshed.",
    )
)
