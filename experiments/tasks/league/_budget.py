"""The sizes of a model's kernels, from which methods of other forms than LoRA take theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import subspace_jax as sj

RANK = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """What LoRA of rank 4 on all kernels trains, and the kernels.

    Attributes:
      sides: path to the input and output size of each kernel.
      arrays: path to each pretrained kernel.
      values: trained values of LoRA of rank 4.
      width: of the model: the side of its smallest square kernels.
    """

    sides: Mapping[str, tuple[int, int]]
    arrays: Mapping[str, Any]
    values: int
    width: int

    @property
    def each(self) -> int:
        """Values for a kernel on average."""
        return self.values // len(self.sides)

    def threshold(self) -> float:
        """The magnitude below which as many entries of the kernels lie as there are values."""
        flat = np.concatenate([np.abs(np.asarray(array)).ravel() for array in self.arrays.values()])
        return float(np.partition(flat, self.values)[self.values])


def find_budget(kernels: str, params: Any, roles: Mapping[str, sj.Role]) -> Budget:
    """Returns the budget of a model.

    Args:
      kernels: pattern of the kernels that methods adapt.
      params: pretrained parameters.
      roles: of their leaves.
    """
    adapted = sj.adapt(params, {kernels: sj.lora(RANK)}, key=jax.random.key(0), roles=roles)
    rows = [row for row in sj.summary(adapted) if row.trainable]
    sides = {row.path: roles[row.path].sizes(row.shape) for row in rows}
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    width = min(n for n, m in sides.values() if n == m)
    return Budget(sides, {path: named[path] for path in sides}, sum(row.trainable for row in rows), width)
