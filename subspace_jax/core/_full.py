"""The stand-in weight of full fine-tuning: the array itself, trainable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._weight import Weight


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Weight):
    """The array itself, trainable; `with_adapters` puts it back before the model runs.

    Attributes:
      value: the array, of the weight's shape.
    """

    value: jax.Array

    divisible: ClassVar[tuple[str, ...]] = ("in", "out")
    axes: ClassVar[Mapping[str, str]] = {"value": "array"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def formed(self) -> bool:
        """True: the array is there already."""
        return True

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array, cast to `dtype` if one is given."""
        return self.with_frozen_stopped().value.astype(self.dtype if dtype is None else dtype)
