"""Errors of saving and loading; each names the file, the leaf, what came and what was expected."""

from __future__ import annotations

from collections.abc import Iterable

from subspace_jax.core import SubspaceError


class ManifestError(SubspaceError):
    """A tree cannot be described, or a description does not fit the arrays beside it."""


class CheckpointError(SubspaceError):
    """A checkpoint cannot be written, or what is on disk is not the checkpoint asked for."""


class AdapterFileError(SubspaceError):
    """An adapter file cannot be written, is damaged or hostile, or belongs to other weights."""


def listing(lines: Iterable[str], limit: int = 8) -> str:
    """Returns lines indented below each other, cut after `limit` of them."""
    lines = list(lines)
    shown = [f"\n  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"\n  and {len(lines) - limit} more")
    return "".join(shown)
