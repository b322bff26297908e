"""Paths of leaves as strings, and the globs that select them."""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import jax

from subspace_jax.core._types import PyTree
from subspace_jax.core._weight import is_weight

# A dict's key of this name is another one.
_VARIABLE = jax.tree_util.GetAttrKey("value")


def path_string(path: tuple[Any, ...]) -> str:
    """Returns a key path as names joined by slashes; the `.value` of a variable of Flax NNX is left out.

    `nnx.state(model)` holds variables, whose arrays are attributes `value`; `nnx.Optimizer` initializes with it, and
    updates with trees without variables. Both have one path here.

    Example:
      >>> import jax
      >>> leaves = jax.tree_util.tree_leaves_with_path({"head": {"kernel": 1.0}})
      >>> path_string(leaves[0][0])
      'head/kernel'
    """
    if path and path[-1] == _VARIABLE:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns path and value of every leaf, stand-in weights whole.

    Example:
      >>> leaves_with_paths({"a": {"b": 1}, "c": 2})
      [('a/b', 1), ('c', 2)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return [(path_string(path), value) for path, value in leaves]


def map_with_paths(function: Any, tree: PyTree, *rest: Any) -> PyTree:
    """Maps `function(path, leaf, ...)` over a tree, stand-in weights whole."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *values: function(path_string(path), *values), tree, *rest, is_leaf=is_weight
    )


def matches(pattern: str, path: str) -> bool:
    """Tells whether a whole path fits a glob.

    `*` stands for any characters within one name, `?` for one of them, `**` for any number of whole names,
    `[abc]` for one of these characters, `[!abc]` for any other, `{a,b}` for either.

    Example:
      >>> matches("**/attention/*/kernel", "layer_0/attention/query/kernel")
      True
      >>> matches("*/kernel", "layer_0/attention/kernel")
      False
      >>> matches("**/{query,value}/kernel", "layer_0/attention/value/kernel")
      True
    """
    return any(_names_match(names, tuple(path.split("/"))) for names in _alternatives(pattern))


@functools.lru_cache(maxsize=1024)
def _alternatives(pattern: str) -> tuple[tuple[str, ...], ...]:
    """The globs that a pattern's braces stand for, each split into its names."""

    def expand(text: str) -> list[str]:
        start = text.find("{")
        end = text.find("}", start)
        if start < 0 or end < 0:
            return [text]
        choices = text[start + 1 : end].split(",")
        return [text[:start] + choice + rest for choice in choices for rest in expand(text[end + 1 :])]

    return tuple(tuple(one.split("/")) for one in expand(pattern))


def _names_match(patterns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first == "**":
        return any(_names_match(tuple(rest), names[i:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _names_match(tuple(rest), names[1:])
