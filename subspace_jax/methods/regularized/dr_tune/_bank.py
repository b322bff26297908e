"""A queue of features of both encoders, aligned row by row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import StructureError, check_int

EMPTY = -1


class FeatureBank(NamedTuple):
    """The last samples as both encoders saw them; arrays only, so that it passes `jit`, checkpoints and shardings.

    Attributes:
      pretrained: features of the frozen encoder, `[size, width]` in float32.
      downstream: features of the trained encoder when the sample came by, likewise.
      labels: int32 `[size]`; -1 for a row that is empty, which counts nowhere.
      pointer: int32 scalar, the row that is written next.
      step: int32 scalar, steps of this epoch, by which rotations are refreshed.
      rotation: the last rotation, `[width, width]`.
    """

    pretrained: jax.Array
    downstream: jax.Array
    labels: jax.Array
    pointer: jax.Array
    step: jax.Array
    rotation: jax.Array


def init_bank(size: int, width: int) -> FeatureBank:
    r"""Returns an empty bank; fill it with `fill` before the first step.

    Args:
      size: \(K\), a multiple of the batch size; 2048 as published. The weight of the regularizer is \(K/(B+K)\).
      width: \(E\), number of features.

    Returns:
      A bank of \(2KE + E^2\) floats.

    Raises:
      RankError: a size is not a positive integer.

    Example:
      >>> init_bank(8, 3).labels.tolist()
      [-1, -1, -1, -1, -1, -1, -1, -1]
    """
    size, width = check_int("init_bank: size", size), check_int("init_bank: width", width)
    zero = jnp.zeros([], jnp.int32)
    features = jnp.zeros((size, width), jnp.float32)
    labels = jnp.full((size,), EMPTY, jnp.int32)
    return FeatureBank(features, jnp.copy(features), labels, zero, jnp.copy(zero), jnp.eye(width, dtype=jnp.float32))


def enqueue(bank: FeatureBank, pretrained: jax.Array, downstream: jax.Array, labels: jax.Array) -> FeatureBank:
    """Writes a batch over the oldest rows.

    Args:
      bank: the bank; its size is a multiple of the batch's.
      pretrained: features of the frozen encoder, `[batch, width]`.
      downstream: features of the trained encoder, likewise.
      labels: their classes, integers `[batch]`.

    Returns:
      The bank with exactly these rows changed; no gradient passes.

    Raises:
      StructureError: shapes do not fit, or labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> bank = enqueue(init_bank(4, 1), jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.array([5, 6]))
      >>> bank.labels.tolist(), int(bank.pointer)
      ([5, 6, -1, -1], 2)
    """
    check_batch("enqueue", bank, pretrained, downstream, labels)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, lax.stop_gradient(new).astype(old.dtype), bank.pointer, 0)

    return bank._replace(
        pretrained=write(bank.pretrained, pretrained),
        downstream=write(bank.downstream, downstream),
        labels=write(bank.labels, labels),
        pointer=(bank.pointer + labels.shape[0]) % bank.labels.shape[0],
    )


def fill(bank: FeatureBank, features: jax.Array, labels: jax.Array) -> FeatureBank:
    """Fills the bank with pretrained features for both encoders: the warm-up before training.

    Go round the data until every row has a label (`bank.labels >= 0`), more than once if it has fewer samples than
    the bank has rows. Rows that stay empty count nowhere.

    Args:
      bank: the bank; its size is a multiple of the batch's.
      features: of the pretrained encoder, `[batch, width]`.
      labels: their classes, integers `[batch]`.

    Raises:
      StructureError: shapes do not fit, or labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> fill(init_bank(2, 1), jnp.ones((2, 1)), jnp.array([5, 6])).downstream.tolist()
      [[1.0], [1.0]]
    """
    return enqueue(bank, features, features, labels)


def new_epoch(bank: FeatureBank) -> FeatureBank:
    """Restarts the count of steps by which rotations are refreshed, as the authors do at the start of every epoch.

    Example:
      >>> int(new_epoch(init_bank(2, 1)).step)
      0
    """
    return bank._replace(step=jnp.zeros_like(bank.step))


def check_batch(
    what: str, bank: FeatureBank, pretrained: jax.Array, downstream: jax.Array, labels: jax.Array
) -> tuple[int, int]:
    """Returns batch size and width, and refuses what does not fit the bank."""
    size, width = bank.pretrained.shape
    shapes = {"pretrained": pretrained.shape, "downstream features": downstream.shape}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1] != width or shape[0] != labels.shape[0]:
            raise StructureError(
                f"dr_tune.{what}: {name} {shape} with labels {labels.shape} and a bank of width {width}; expected "
                "[batch, width] of both encoders, pooled, and [batch]."
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.ndim != 1:
        raise StructureError(f"dr_tune.{what}: labels {labels.shape} of {labels.dtype}; expected integers [batch].")
    if size % labels.shape[0]:
        raise StructureError(
            f"dr_tune.{what}: a batch of {labels.shape[0]} does not divide the bank's {size} rows. Make the bank a "
            "multiple of the batch, and drop the last, incomplete one."
        )
    return labels.shape[0], width
