"""The error of a user's own data."""

from __future__ import annotations

from collections.abc import Iterable

from subspace_jax.core import SubspaceError

SHOWN = 12


class DataError(SubspaceError):
    """A user's file, row or image cannot be used; the message says which, why, and how to mend it.

    Args:
        message: what is wrong with what, and what was expected.
        lines: one line for every bad row or file; the first twelve are shown and the rest counted.
    """

    def __init__(self, message: str, lines: Iterable[str] = ()) -> None:
        self.lines = tuple(lines)
        shown = [f"  {line}" for line in self.lines[:SHOWN]]
        if len(self.lines) > SHOWN:
            shown.append(f"  and {len(self.lines) - SHOWN} more")
        super().__init__("\n".join([message, *shown]))
