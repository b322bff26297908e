"""Brings stored features of the frozen encoder to where the trained one has them: a rotation, then class by class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.linalg import whole_matrices
from subspace_jax.methods.regularized.dr_tune._bank import FeatureBank

# Share of the root mean square of H's singular values that is added to its diagonal: above the rounding of float32 in
# H's null space, and far below what is known of the rows.
RIDGE = 3e-6


def rotation(features: jax.Array, targets: jax.Array, held: jax.Array | None = None) -> jax.Array:
    r"""Returns the rotation that brings centered features nearest to centered targets: Kabsch's algorithm.

    \(H = X_c^T V_c = U S Q^T\), \(\Omega = U\,\mathrm{diag}(1, \dots, 1, \det(U Q^T))\,Q^T\). With fewer rows than
    features H says nothing about directions that no row has, and any map of them would do: a ridge of
    \(3 \cdot 10^{-6} \|H\|_F / \sqrt{E}\) on its diagonal leaves those as they are, so that a rotation
    can serve later rows.

    Args:
      features: \(X\), `[rows, width]`.
      targets: \(V\), likewise.
      held: booleans `[rows]`, which rows count; all if None.

    Returns:
      \(\Omega\), `[width, width]`, orthogonal with determinant one. The identity where nothing is held.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (9, 2))
      >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> bool(jnp.abs(rotation(x, x @ turn) - turn).max() < 1e-5)
      True
    """
    x, v = (_centered(m, _weights(held, m))[0] for m in (features, targets))
    h = jnp.matmul(x.T, v, precision=lax.Precision.HIGHEST)
    size = jnp.sqrt(jnp.sum(jnp.square(h)) / h.shape[0])
    ridge = jnp.where(size > 0, RIDGE * size, 1.0)
    u, _, qt = jnp.linalg.svd(whole_matrices(h + ridge * jnp.eye(h.shape[0], dtype=h.dtype)))
    # The sign only: the determinant itself is one but for rounding.
    sign = jnp.sign(jnp.linalg.det(jnp.matmul(u, qt, precision=lax.Precision.HIGHEST)))
    return jnp.matmul(u.at[:, -1].multiply(sign), qt, precision=lax.Precision.HIGHEST)


def rotate(features: jax.Array, targets: jax.Array, turn: jax.Array, held: jax.Array | None = None) -> jax.Array:
    r"""Turns features about their mean and puts them at the targets' mean: \((X - \bar X)\,\Omega + \bar V\).

    Args:
      features: \(X\), `[rows, width]`.
      targets: \(V\), likewise.
      turn: \(\Omega\), `[width, width]`.
      held: booleans `[rows]`, which rows count in the means; all if None.

    Example:
      >>> import jax.numpy as jnp
      >>> rotate(jnp.array([[0.0], [2.0]]), jnp.array([[5.0], [5.0]]), jnp.eye(1)).tolist()
      [[4.0], [6.0]]
    """
    centered, _ = _centered(features, _weights(held, features))
    _, mean = _centered(targets, _weights(held, targets))
    return jnp.matmul(centered, turn, precision=lax.Precision.HIGHEST) + mean


def translate(
    features: jax.Array, targets: jax.Array, labels: jax.Array, kernel: jax.Array, *, confidence: bool = True
) -> jax.Array:
    r"""Shifts every class so that its mean is the targets' mean: \(X_i + \nu_{y_i} - \mu_{y_i}\).

    \(\mu_j\) is the plain mean of class j among the features, \(\nu_j = \sum_i a_i V_i\) that of the targets with
    weights \(a = \mathrm{softmax}(\cos(V_i, w_j))\) over the class, by how certain the head is of them. A class with
    one row lands on its partner; absent classes move nothing.

    Args:
      features: \(X\), `[rows, width]`.
      targets: \(V\), likewise.
      labels: classes `[rows]`; -1 for rows that do not count.
      kernel: the head's, `[width, classes]`, with \(w_j\) its columns.
      confidence: weights as above; equal ones if False, which is not the published method.

    Example:
      >>> import jax.numpy as jnp
      >>> x, v = jnp.array([[0.0], [2.0], [7.0]]), jnp.array([[1.0], [1.0], [3.0]])
      >>> translate(x, v, jnp.array([0, 0, 1]), jnp.ones((1, 2))).tolist()
      [[0.0], [2.0], [3.0]]
    """
    classes = kernel.shape[1]
    own = jnp.where(labels >= 0, labels, classes)  # empty rows are one more class, which is left out
    a = jnp.ones(labels.shape, features.dtype)
    if confidence:
        unit = _unit(kernel.astype(features.dtype).T)[jnp.minimum(own, classes - 1)]
        # A cosine is at most one, so that this is the softmax of class by class without overflow.
        a = jnp.exp(jnp.sum(_unit(targets) * unit, -1) - 1.0)
    count = jax.ops.segment_sum(jnp.ones_like(a), own, classes + 1)
    total = jax.ops.segment_sum(a, own, classes + 1)
    mu = jax.ops.segment_sum(features, own, classes + 1) / jnp.maximum(count, 1.0)[:, None]
    weighted = jax.ops.segment_sum(a[:, None] * targets, own, classes + 1)
    nu = weighted / jnp.where(total > 0, total, 1.0)[:, None]
    shift = (nu - mu).at[classes].set(0.0)
    return features + shift[own]


def calibrate(
    bank: FeatureBank,
    kernel: jax.Array,
    length: float | jax.Array,
    *,
    turn: jax.Array | None = None,
    classes: bool = True,
    confidence: bool = True,
) -> jax.Array:
    r"""Returns the bank's pretrained features as the trained encoder would have them now, for the head to classify.

    Rows of both encoders are brought to length one, turned (`rotate`), shifted class by class (`translate`), and
    brought to one length again. Nothing of it is differentiated.

    Args:
      bank: as it was before the batch that is learned from is written into it.
      kernel: the head's, `[width, classes]`.
      length: \(\ell\), the mean length of the batch's downstream features.
      turn: from `rotation`; None leaves it out.
      classes: shift class by class.
      confidence: weigh rows of a class by the head's certainty.

    Returns:
      `[size, width]` in float32, rows of length \(\ell\).

    Example:
      >>> import jax.numpy as jnp
      >>> from subspace_jax.methods.regularized.dr_tune import fill, init_bank
      >>> bank = fill(init_bank(2, 2), jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([0, 1]))
      >>> calibrate(bank, jnp.zeros((2, 2)), 10.0).round(4).tolist()
      [[6.0, 8.0], [0.0, 10.0]]
    """
    bank, kernel, length = lax.stop_gradient((bank, kernel, length))
    x, v = _unit(bank.pretrained), _unit(bank.downstream)
    if turn is not None:
        x = rotate(x, v, lax.stop_gradient(turn), bank.labels >= 0)
    if classes:
        x = translate(x, v, bank.labels, kernel, confidence=confidence)
    return _unit(x) * length


def bank_rotation(bank: FeatureBank) -> jax.Array:
    """Returns the rotation from the bank's pretrained to its downstream features, both of length one."""
    return rotation(_unit(bank.pretrained), _unit(bank.downstream), bank.labels >= 0)


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _weights(held: jax.Array | None, rows: jax.Array) -> jax.Array:
    count = jnp.ones(rows.shape[:1], rows.dtype) if held is None else held.astype(rows.dtype)
    return count[:, None]


def _centered(rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows less their mean, zero where they do not count, and the mean."""
    mean = jnp.sum(rows * weights, 0) / jnp.maximum(jnp.sum(weights), 1.0)
    return (rows - mean) * weights, mean
