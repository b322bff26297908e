"""The entries of a `config.json`, read by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from subspace_jax.core import WeightFileError


class Facts:
    """The entries of a `config.json`, read by name; entries that decide something we do not have are refused.

    Args:
        entries: of the file.
        source: what messages call it.
    """

    def __init__(self, entries: Mapping[str, Any], source: str) -> None:
        self.entries, self.source = entries, source

    def __getitem__(self, name: str) -> Any:
        if name not in self.entries:
            raise WeightFileError(f"{self.source}: the entry {name!r} is missing; is the file whole?")
        return self.entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an entry, or the default where it is missing or null."""
        value = self.entries.get(name)
        return default if value is None else value

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        """Raises for an entry whose value cannot be served."""
        raise WeightFileError(f"{self.source}: {name}={value!r} {why}.")

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses an entry that is there with another value."""
        value = self.entries.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, value, f"is not served; expected {' or '.join(map(repr, allowed))}")
