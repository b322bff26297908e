"""Errors of the library; each message names the leaf, what came, what was expected and what helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SubspaceError(ValueError):
    """Base of this library's own errors, a ValueError; option values out of range may raise a plain ValueError."""


class PatternError(SubspaceError):
    """A pattern or predicate selects nothing, or something that cannot be adapted."""


class RoleError(SubspaceError):
    """A leaf cannot be read as a matrix from inputs to outputs, or it is not known how."""


class RankError(SubspaceError):
    """A rank or another integer option is no integer, out of range, or larger than the weight's shape allows."""


class NonFiniteError(SubspaceError):
    """A weight holds NaN or infinity."""


class StatisticsError(SubspaceError):
    """A method needs statistics that were not captured."""


class MaterializeError(SubspaceError):
    """A model uses a stand-in weight in a way that would form the full array."""


class NotMergeableError(SubspaceError):
    """A weight depends on the input, so that no single array equals it."""


class StructureError(SubspaceError):
    """Two trees that must have the same structure or shapes do not."""


class WeightFileError(SubspaceError):
    """A file of pretrained weights lacks a tensor, has one too many, or one of another shape or type."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Returns `names` closest to `name` as one readable string, for error messages.

    >>> nearest("encoder/kernal", ["encoder/kernel", "head/bias"], 1)
    "'encoder/kernel'"
    """
    found: Sequence[str] = difflib.get_close_matches(name, list(names), n=count, cutoff=0.0)
    return ", ".join(repr(n) for n in found) if found else "none (the tree has no leaves)"
