"""Selectors of leaves: globs over paths, predicates, and tuples of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from subspace_jax.core._errors import PatternError, nearest
from subspace_jax.core._paths import leaves_with_paths, matches
from subspace_jax.core._types import PyTree

Selector = str | Callable[[str, jax.Array], bool] | tuple[Any, ...]


def rule_pairs(rules: Any) -> list[tuple[Any, Any]]:
    """Returns ordered rules, given as a dict or as pairs, as a list of pairs."""
    return list(rules.items()) if isinstance(rules, Mapping) else list(rules)


def few(paths: list[str]) -> str:
    """Returns the first paths of a list, for messages."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def check_selector(selector: Selector, leaves: list[tuple[str, Any]], what: str = "") -> None:
    """Refuses a selector, or a part of a tuple of them, that matches nothing."""
    if isinstance(selector, tuple):
        for one in selector:
            check_selector(one, leaves, what)
        if selector:
            return
    elif not isinstance(selector, str) and not callable(selector):
        raise TypeError(
            f"{what}{selector!r} is a {type(selector).__name__}; expected a glob such as '**/kernel', a predicate of "
            "path and array, or a tuple of these."
        )
    elif any(selects(selector, path, leaf) for path, leaf in leaves):
        return
    paths = [path for path, _ in leaves]
    hint = (
        f"nearest paths: {nearest(selector.replace('**/', ''), paths)}"
        if isinstance(selector, str)
        else (f"the tree has {len(paths)} leaves, the first is {paths[0] if paths else None!r}")
    )
    raise PatternError(
        f"{what}{selector!r} matches no leaf; {hint}. `*` stays within one name, `**` crosses any depth."
    )


def selects(selector: Selector, path: str, leaf: Any) -> bool:
    """Tells whether a selector takes a leaf."""
    if isinstance(selector, tuple):
        return any(selects(one, path, leaf) for one in selector)
    return matches(selector, path) if isinstance(selector, str) else bool(selector(path, leaf))


def select_paths(tree: PyTree, selector: Selector | Iterable[str]) -> list[str]:
    """Returns the paths that a selector matches.

    Args:
      tree: any tree.
      selector: a glob, a predicate of path and array, or several globs.

    Raises:
      PatternError: a glob matches nothing.
      TypeError: `selector` is none of these.
    """
    leaves = leaves_with_paths(tree)
    selectors = (selector,) if isinstance(selector, str) or callable(selector) else tuple(selector)
    check_selector(selectors, leaves)
    return [path for path, leaf in leaves if selects(selectors, path, leaf)]
