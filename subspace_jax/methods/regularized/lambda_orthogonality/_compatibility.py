"""Losses that make the features of a new model and those of an old one comparable.

λ-Orthogonality Regularization for Compatible Representation Learning (Ricci, Biondi, Pernici, Patras, Del Bimbo, 2025).

Of one batch: old features h, `[batch, old width]`; new features g; mapped back B(g), `[batch, new width]`; mapped
forward F(h), `[batch, new width]`. Where widths differ, the first coordinates that both have are compared.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import StructureError
from subspace_jax.linalg import whole_matrices, wide_dtype, wide_matmul
from subspace_jax.methods.regularized.lambda_orthogonality._penalty import lambda_orthogonality

Reduction = Literal["mean", "sum"]


class AlignmentLosses(NamedTuple):
    """Squared distances, float32 scalars.

    Attributes:
      backward: of B(g) from h.
      forward: of F(h) from B(g).
    """

    backward: jax.Array
    forward: jax.Array


class CompatibilityLosses(NamedTuple):
    """The loss and its parts before they are weighted, float32 scalars.

    Attributes:
      total: the weighted sum, to minimize.
      forward: L_F.
      backward: L_B.
      contrastive: L_C.
      orthogonality: the regularizer; zero without a kernel.
    """

    total: jax.Array
    forward: jax.Array
    backward: jax.Array
    contrastive: jax.Array
    orthogonality: jax.Array


def alignment_losses(
    mapped_new: jax.Array, mapped_old: jax.Array, old: jax.Array, *, reduction: Reduction = "mean"
) -> AlignmentLosses:
    r"""Returns the losses that align both maps: \(L_B = \|B(g) - h\|^2\) and \(L_F = \|F(h) - B(g)\|^2\).

    Where widths differ, \(L_B\) compares the coordinates that both have.

    F aims at B(g), not at g, and B at F(h) too: there is one common space, and both maps learn from both losses.

    Args:
      mapped_new: \(B(g)\), `[batch, new width]`.
      mapped_old: \(F(h)\), `[batch, new width]`.
      old: \(h\), `[batch, old width]`.
      reduction: over coordinates, "mean" or "sum"; over the batch it is the mean.

    Raises:
      StructureError: the shapes do not fit each other.
      ValueError: `reduction` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = alignment_losses(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 2)), reduction="sum")
      >>> losses.backward.item(), losses.forward.item()
      (2.0, 3.0)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'alignment_losses: reduction={reduction!r}; expected "mean" or "sum".')
    _check("alignment_losses", mapped_new, mapped_old, old)
    mapped_new, mapped_old, old = _widened(mapped_new, mapped_old, old)
    reduced = jnp.mean if reduction == "mean" else jnp.sum

    def squared(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.mean(reduced(jnp.square(a - b), axis=-1))

    return AlignmentLosses(squared(*_truncated(mapped_new, old)), squared(mapped_old, mapped_new))


def contrastive_loss(
    left: jax.Array, right: jax.Array, labels: jax.Array | None = None, *, temperature: float | jax.Array = 0.1
) -> jax.Array:
    r"""Returns the cross-entropy of similarities between two feature sets of one batch, all items of a class positive.

    \(q_i = \mathrm{softmax}_j(\cos(u_i, v_j) / \tau)\) against \(p_{ij} = [y_i = y_j] / \sum_k [y_i = y_k]\), mean over
    the rows of the left set. With all labels equal it is at least \(\log K\); with none equal it is InfoNCE.

    Args:
      left: \(u\), `[batch, features]`.
      right: \(v\), `[batch, features]`.
      labels: \(y\), `[batch]` integers; None for each row its own class, as CLIP has it.
      temperature: \(\tau\).

    Returns:
      A float32 scalar.

    Raises:
      StructureError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.eye(2)
      >>> round(contrastive_loss(x, x, temperature=1.0).item(), 4), round(contrastive_loss(x, x[::-1]).item(), 4)
      (0.3133, 10.0)
    """
    if left.shape != right.shape or left.ndim != 2 or (labels is not None and labels.shape != left.shape[:1]):
        raise StructureError(
            f"contrastive_loss: features {left.shape} and {right.shape} with labels "
            f"{None if labels is None else labels.shape}; expected twice [batch, features] and [batch]."
        )
    left, right = (_normalized(v) for v in _widened(left, right))
    logits = wide_matmul(left, right.T, split=(-2, None)) / temperature
    rows = jnp.arange(len(left)) if labels is None else labels
    # Every row is compared with all columns, so that these are needed whole on every device.
    same = (rows[:, None] == whole_matrices(rows[None, :])).astype(logits.dtype)
    return jnp.mean(optax.softmax_cross_entropy(logits, same / jnp.sum(same, axis=-1, keepdims=True)))


def compatibility_loss(
    mapped_new: jax.Array,
    mapped_old: jax.Array,
    old: jax.Array,
    labels: jax.Array | None = None,
    *,
    kernel: Any = None,
    lam: float | jax.Array | None = None,
    alpha: float | jax.Array = 1.0,
    weights: tuple[Any, Any, Any, Any] = (1.0, 1.0, 1.0, 1.0),
    temperature: float | jax.Array = 0.1,
    reduction: Reduction = "mean",
) -> CompatibilityLosses:
    r"""Returns the loss that trains both maps together: \(w_1 L_F + w_2 L_B + w_3 L_C + w L_\lambda\).

    \(L_C\) is `contrastive_loss` of F(h) against B(g) plus that of F(h) against h. Published: \(w = 1\); 0.1 works
    as well, 0.01 does not hold the map at \(\lambda\). The other weights, \(\tau\) and \(\alpha\) are not published;
    ours are 1, 0.1 and 1.

    Args:
      mapped_new: \(B(g)\), `[batch, new width]`.
      mapped_old: \(F(h)\), `[batch, new width]`.
      old: \(h\), `[batch, old width]`.
      labels: `[batch]` integers; None for each row its own class.
      kernel: of the relaxed backward map, to regularize; None for a strictly orthogonal one, or where
        `sj.methods.lambda_orthogonality.add_lambda_orthogonality` adds the gradient.
      lam: \(\lambda\), the allowed distance of `kernel` from orthogonal; \(0.375 \sqrt{n}\) if None.
      alpha: steepness of the gate of the regularizer; positive.
      weights: \((w_1, w_2, w_3, w)\).
      temperature: \(\tau\) of the contrastive loss.
      reduction: of the alignment losses over coordinates.

    Returns:
      The loss and its parts.

    Raises:
      StructureError: the shapes do not fit each other.
      ValueError: `reduction` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> h, g = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> loss = lambda w: compatibility_loss(g @ w, h, h, kernel=w).total
      >>> jax.grad(loss)(jnp.eye(3)).shape
      (3, 3)
    """
    backward, forward = alignment_losses(mapped_new, mapped_old, old, reduction=reduction)
    contrast = contrastive_loss(mapped_old, mapped_new, labels, temperature=temperature)
    contrast += contrastive_loss(*_truncated(mapped_old, old), labels, temperature=temperature)
    held = jnp.zeros((), contrast.dtype) if kernel is None else lambda_orthogonality(kernel, lam, alpha)
    parts = (forward, backward, contrast, held)
    return CompatibilityLosses(sum((w * part for w, part in zip(weights, parts, strict=True)), jnp.zeros(())), *parts)


def _check(name: str, mapped_new: jax.Array, mapped_old: jax.Array, old: jax.Array) -> None:
    if mapped_new.shape != mapped_old.shape or old.ndim != 2 or mapped_new.shape[:-1] != old.shape[:-1]:
        raise StructureError(
            f"{name}: mapped_new {mapped_new.shape}, mapped_old {mapped_old.shape}, old {old.shape}; expected twice "
            "[batch, new width] and [batch, old width]. The forward map has to end in the new model's width."
        )


def _widened(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(v.astype(wide_dtype(v.dtype)) for v in arrays)


def _truncated(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both on the first coordinates that both have."""
    width = min(a.shape[-1], b.shape[-1])
    return a[..., :width], b[..., :width]


def _normalized(rows: jax.Array) -> jax.Array:
    """Rows of length one, or zero, with a finite gradient."""
    squares = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
