"""The loss of a step, and the bank after it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from subspace_jax.core import StructureError, check_choice, check_int
from subspace_jax.methods.regularized.dr_tune._bank import FeatureBank, check_batch, enqueue
from subspace_jax.methods.regularized.dr_tune._calibrate import bank_rotation, calibrate

CALIBRATIONS = ("full", "rotation", "translation", "none")


def loss(
    features: jax.Array,
    pretrained: jax.Array,
    labels: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    bank: FeatureBank,
    *,
    calibration: str = "full",
    rotate_every: int = 10,
    keep_rotation: bool = True,
    confidence: bool = True,
    regularize: bool = True,
) -> tuple[jax.Array, FeatureBank]:
    r"""Returns the loss of a batch and the bank with the batch in it.

    The mean cross entropy over the batch's rows and the bank's calibrated ones,
    \(\frac{B}{B+K} \mathrm{CE}(z W + c, y) + \frac{K}{B+K} \mathrm{CE}(\tilde P W + c, Y)\). Only the head learns from
    the second part. The first is small, 3 % at 64 of 64 + 2048: compare with a plain cross entropy at the same rates
    by `regularize=False`, which has that factor too.

    Under data parallelism the bank is one for all devices; `jit` gathers the batch's rows into it.

    Args:
      features: \(z\), the trained encoder's `[batch, width]`, with gradient, in its training mode.
      pretrained: \(p\), the frozen encoder's `[batch, width]`, in its evaluation mode, of the same images.
      labels: \(y\), integers `[batch]`.
      kernel: \(W\), the head's `[width, classes]`; start it from normal values of deviation 0.01.
      bias: \(c\), `[classes]`, or None.
      bank: the state; `fill` it first.
      calibration: "full", "rotation", "translation" or "none".
      rotate_every: steps from one rotation to the next.
      keep_rotation: the last rotation serves in between. The authors' code turns features in every tenth step only and
        leaves them as they were in the others: False.
      confidence: class means of downstream features weighted by the head's certainty, as published.
      regularize: False leaves out the second part.

    Returns:
      A scalar in float32, and the new bank. Differentiate the first, with `has_aux=True`.

    Raises:
      StructureError: shapes do not fit, or the batch does not divide the bank.
      ValueError: an unknown calibration.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> dr_tune, x = sj.methods.dr_tune, jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> bank = dr_tune.fill(dr_tune.init_bank(2, 2), x, jnp.array([0, 1]))
      >>> step = jax.value_and_grad(
      ...     lambda head: dr_tune.loss(x, x, jnp.array([0, 1]), head, None, bank), has_aux=True
      ... )
      >>> (value, bank), gradient = step(jnp.zeros((2, 2)))
      >>> round(float(value), 4), int(bank.step)
      (0.6931, 1)
    """
    check_choice("dr_tune.loss: calibration", calibration, CALIBRATIONS)
    rotate_every = check_int("dr_tune.loss: rotate_every", rotate_every)
    rows, width = check_batch("loss", bank, pretrained, features, labels)
    if kernel.ndim != 2 or kernel.shape[0] != width:
        raise StructureError(f"dr_tune.loss: kernel {kernel.shape}; expected ({width}, classes), the head's.")
    bank, z = lax.stop_gradient(bank), features.astype(jnp.float32)
    task = jnp.sum(_cross_entropy(z, labels, kernel, bias))
    held = bank.labels >= 0
    total = rows + jnp.sum(held)
    turn = bank.rotation
    if calibration in ("full", "rotation"):
        fresh = bank.step % rotate_every == 0
        turn = lax.cond(fresh, bank_rotation, lambda bank: bank.rotation, bank)
    if regularize:
        length = jnp.mean(jnp.linalg.norm(lax.stop_gradient(z), axis=-1))
        moved = _calibrated(bank, kernel, length, turn, calibration, keep_rotation, rotate_every, confidence)
        entropies = _cross_entropy(moved, jnp.maximum(bank.labels, 0), kernel, bias)
        task = task + jnp.sum(jnp.where(held, entropies, 0.0))
    bank = enqueue(bank, pretrained, features, labels)
    return task / total, bank._replace(step=bank.step + 1, rotation=turn)


def _calibrated(
    bank: FeatureBank,
    kernel: jax.Array,
    length: jax.Array,
    turn: jax.Array,
    calibration: str,
    keep: bool,
    every: int,
    confidence: bool,
) -> jax.Array:
    options: dict[str, Any] = {"classes": calibration in ("full", "translation"), "confidence": confidence}
    if calibration in ("translation", "none"):
        return calibrate(bank, kernel, length, **options)
    if keep or every == 1:
        return calibrate(bank, kernel, length, turn=turn, **options)
    return lax.cond(
        bank.step % every == 0,
        lambda: calibrate(bank, kernel, length, turn=turn, **options),
        lambda: calibrate(bank, kernel, length, **options),
    )


def _cross_entropy(features: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = jnp.matmul(features, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
