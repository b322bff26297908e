"""What DoRA adds to the tensors of LoRA: the lengths of the output columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Weight
from subspace_jax.io.peft._checks import require_parts
from subspace_jax.io.peft._layout import unstack
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.low_rank.dora import Magnitude
from subspace_jax.weights import AsLowRank, LowRank


def is_dora(weight: Any) -> bool:
    """Tells whether a weight has lengths of its own."""
    return isinstance(weight, Magnitude)


def is_low_rank(weight: Any) -> bool:
    """Tells whether a weight is LoRA, or DoRA of LoRA."""
    return isinstance(direction_of(weight), (LowRank, AsLowRank))


def direction_of(weight: Any) -> Any:
    """Returns the weight whose columns are scaled, or the weight itself."""
    return weight.direction if isinstance(weight, Magnitude) else weight


def lengths_of(weight: Any, place: TensorPlace) -> list[np.ndarray | None]:
    """Returns the lengths `[out]` of each module; None for a weight without any."""
    if not isinstance(weight, Magnitude):
        return [None] * len(place.modules)
    require_parts(place.path, weight, "magnitude")
    return list(unstack(weight.magnitude, place, place.path))


def with_lengths(low_rank: LowRank, lengths: np.ndarray, place: TensorPlace) -> Weight:
    """Returns the weight with lengths `[*stack, out]`, as `dora(lora(...))` makes it."""
    array = jnp.asarray(low_rank.base)
    matrix = place.role.matrix(array).astype(wide_dtype(array.dtype))
    return Magnitude(
        # The frozen part of the lengths, once, so that no step reads every weight for it.
        direction=dataclasses.replace(low_rank, base_squares=jnp.sum(matrix * matrix, axis=-2), method=""),
        magnitude=jnp.asarray(lengths),
        role=low_rank.role,
        dtype=low_rank.dtype,
        trainable=("magnitude",),
        method=f"dora({low_rank.method})",
    )
