"""Changes every weight of one class in a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from subspace_jax.core import PyTree, Weight, is_weight, map_with_paths

W = TypeVar("W", bound=Weight)


def map_weights(kind: type[W], function: Callable[[str, W], Any], tree: PyTree) -> PyTree:
    """Applies `function(path, weight)` to every weight of a class, also inside other weights.

    Args:
      kind: the class.
      function: takes the path of the leaf and the weight.
      tree: any tree; other leaves stay as they are.
    """

    def one(path: str, value: Any) -> Any:
        if isinstance(value, kind):
            return function(path, value)
        if is_weight(value):
            return value.map_fields(lambda _, v: one(path, v) if isinstance(v, Weight) else v)
        return value

    return map_with_paths(one, tree)
