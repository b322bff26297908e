"""Finds the original arrays of adapters, for methods that replace a residual base by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from subspace_jax.core import Params, StructureError, Weight, leaves_with_paths


def original_arrays(params: Params) -> Callable[[str, Weight], Any]:
    """Returns a function of path and weight that finds the array which the weight was made of.

    Args:
      params: the tree that `adapt` was given.

    Raises:
      StructureError: by that function, where the tree has no array of the weight's shape at the path.
    """
    by_path = dict(leaves_with_paths(params))

    def find(path: str, weight: Weight) -> Any:
        original = by_path.get(path)
        if original is None or original.shape != weight.shape:
            found = "nothing" if original is None else f"an array of shape {original.shape}"
            raise StructureError(
                f"{path}: params has {found} here, the adapter stands for shape {weight.shape}. Pass the tree that "
                "adapt() was given."
            )
        return original

    return find
