"""Paths of leaves as strings, and the globs that select them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax

from subspace_jax.core._weight import is_weight


def path_string(path: tuple[Any, ...]) -> str:
    """Returns a key path as names joined by slashes.

    Example:
      >>> import jax
      >>> leaves = jax.tree_util.tree_leaves_with_path({"head": {"kernel": 1.0}})
      >>> path_string(leaves[0][0])
      'head/kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Returns path and value of every leaf, stand-in weights whole.

    Example:
      >>> leaves_with_paths({"a": {"b": 1}, "c": 2})
      [('a/b', 1), ('c', 2)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return [(path_string(path), value) for path, value in leaves]


def map_with_paths(function: Any, tree: Any, *rest: Any) -> Any:
    """Maps `function(path, leaf, ...)` over a tree, stand-in weights whole."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *values: function(path_string(path), *values), tree, *rest, is_leaf=is_weight
    )


@functools.lru_cache(maxsize=1024)
def glob_expression(pattern: str) -> re.Pattern[str]:
    """Compiles a glob over slash-joined paths.

    `*` stands for any characters within one name, `?` for one of them, `**` for any number of whole names,
    `[abc]` for one of these characters, `{a,b}` for either.

    Example:
      >>> bool(glob_expression("**/attention/*/kernel").fullmatch("layer_0/attention/query/kernel"))
      True
      >>> bool(glob_expression("*/kernel").fullmatch("layer_0/attention/kernel"))
      False
    """
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern.startswith("/**", i) and i + 3 == len(pattern):
            out, i = out + "(?:/[^/]+)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] in "[{" and (end := pattern.find("]" if pattern[i] == "[" else "}", i)) > 0:
            inside = pattern[i + 1 : end]
            if pattern[i] == "[":
                out += f"[{'^' + inside[1:] if inside.startswith('!') else inside}]"
            else:
                out += "(?:" + "|".join(map(re.escape, inside.split(","))) + ")"
            i = end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return re.compile(out)


def matches(pattern: str, path: str) -> bool:
    """Tells whether a whole path fits a glob."""
    return glob_expression(pattern).fullmatch(path) is not None
