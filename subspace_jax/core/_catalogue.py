"""The one list of published methods; README's table, the docs and the command line are made from it."""

from __future__ import annotations

import dataclasses

_SOURCES: dict[str, Source] = {}


@dataclasses.dataclass(frozen=True)
class Source:
    """A published method that this library implements.

    Attributes:
      name: short name, as on the command line.
      title: title of the publication.
      authors: its authors.
      year: year of publication.
      public: public names of `subspace_jax` that implement it.
      experiment: the runnable experiment that shows it.
      claim: what the experiment shows, in one sentence.
    """

    name: str
    title: str
    authors: str
    year: int
    public: tuple[str, ...]
    experiment: str
    claim: str


def register(source: Source) -> Source:
    """Enters a method into the catalogue; each method's file does this once.

    Args:
      source: the entry.

    Returns:
      The entry.

    Raises:
      ValueError: the name is taken.
    """
    if source.name in _SOURCES:
        raise ValueError(f"The catalogue already has {source.name!r}, {_SOURCES[source.name].title!r}.")
    _SOURCES[source.name] = source
    return source


def catalogue() -> tuple[Source, ...]:
    """Returns every published method of this library, by name.

    Example:
      >>> import subspace_jax as sj
      >>> [s.year for s in sj.catalogue() if s.name == "pissa"]
      [2024]
    """
    return tuple(_SOURCES[name] for name in sorted(_SOURCES))
