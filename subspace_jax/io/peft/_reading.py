"""What is known of a folder that is read: the one argument of every form's `unpack`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from subspace_jax.io._base import BaseArrays
from subspace_jax.io.peft._config import Settings
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.io.peft._tensors import Found


@dataclasses.dataclass(frozen=True)
class Reading:
    """A folder of PEFT, and the parameters that its adapters are put on.

    Attributes:
      settings: of its config.
      found: its tensors.
      index: place and position of each tensor of the base model, by module and tensor.
      base: the parameters.
    """

    settings: Settings
    found: Found
    index: Mapping[tuple[str, str], tuple[TensorPlace, int]]
    base: BaseArrays

    def place(self, module: str) -> TensorPlace:
        """Returns the place of a module's weight."""
        return self.index[module, "weight"][0]

    def fields(self, place: TensorPlace) -> dict[str, Any]:
        """Returns the fields that every weight at a place has: `role` and `dtype`."""
        return {"role": place.role, "dtype": np.dtype(self.base.leaves[place.path].dtype)}
