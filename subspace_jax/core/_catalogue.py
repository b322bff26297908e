"""The catalogue of published methods, from which docs/methods, its tables and the command line are made."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Kind = Literal["weight", "transformation", "learner", "merger", "penalty", "module", "analysis", "system"]

_SOURCES: dict[str, Source] = {}


@dataclasses.dataclass(frozen=True)
class Source:
    """A published method that this library implements.

    Attributes:
      slug: its name everywhere: of its package, test, experiment and page.
      family: folder of `subspace_jax.methods` that it lives in.
      kinds: what it is: a stand-in weight, a gradient transformation, a learner of streams, a penalty, ...
      title: title of the publication.
      authors: its authors.
      year: year of publication.
      public: its public names, those of `subspace_jax.methods.<slug>`.
      uses: names of `subspace_jax` that several methods share and that complete this one.
      experiment: the runnable experiment that shows it.
      module: full name of its package.
      use_for: when to use it, in a sentence for its page.
      not_for: when not to.
      differs: where this library departs from the publication, or the publication's text from its code.
    """

    slug: str
    family: str
    kinds: tuple[Kind, ...]
    title: str
    authors: str
    year: int
    public: tuple[str, ...]
    uses: tuple[str, ...]
    experiment: str
    module: str
    use_for: str
    not_for: str
    differs: str

    @property
    def citation(self) -> str:
        """Authors, title and year in one line."""
        return f"{self.authors}: {self.title}, {self.year}"


def register(
    module: str,
    *,
    title: str,
    authors: str,
    year: int,
    kinds: tuple[Kind, ...],
    uses: tuple[str, ...] = (),
    experiment: str | None = None,
    use_for: str = "",
    not_for: str = "",
    differs: str = "",
) -> Source:
    """Enters a method into the catalogue; each method's package does this once, at its end.

    Slug and family follow from where the package is, `subspace_jax.methods.<family>.<slug>`, public names are its
    `__all__`. The citation is added to the docstring of each public function and class, so that it is written once.

    Args:
      module: `__name__` of the home.
      title: title of the publication.
      authors: its authors.
      year: year of publication.
      kinds: what kinds of object the method is made of.
      uses: names of `subspace_jax` that several methods share and that complete this one.
      experiment: name of its experiment; the slug if None.
      use_for: when to use it, in a sentence for its page.
      not_for: when not to.
      differs: where this library departs from the publication, or the publication's text from its code.

    Returns:
      The entry.

    Raises:
      ValueError: the slug is taken, a kind is unknown, or the module is not a method's package.
    """
    parts = module.split(".")
    if len(parts) != 4 or parts[1] != "methods":
        raise ValueError(f"{module}: a method registers from its home, subspace_jax.methods.<family>.<slug>.")
    family, slug = parts[2:]
    if slug in _SOURCES:
        raise ValueError(f"The catalogue already has {slug!r}, {_SOURCES[slug].title!r}.")
    unknown = sorted(set(kinds) - set(get_args(Kind)))
    if unknown or not kinds:
        raise ValueError(f"{module}: kinds={kinds!r}; expected some of {', '.join(get_args(Kind))}.")
    public = tuple(sys.modules[module].__all__)
    told = (use_for, not_for, differs)
    source = Source(slug, family, kinds, title, authors, year, public, uses, experiment or slug, module, *told)
    for name in public:
        # Names that `lazy_names` hands out are cited when they are loaded.
        if name in vars(sys.modules[module]):
            _cite(getattr(sys.modules[module], name), source)
    _SOURCES[slug] = source
    return source


def lazy_names(module: str, files: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a method's package for names that are loaded when they are first asked for.

    For what needs a library that takes long to import, such as Flax NNX.

    Args:
      module: `__name__` of the home.
      files: the private file of each name.

    Raises:
      AttributeError: from the function returned, for a name that `files` does not have.

    Example:
      >>> get = lazy_names("subspace_jax.core", {"matches": "_paths"})
      >>> get("matches")("*/kernel", "fc/kernel")
      True
    """

    def get(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{module}.{files[name]}"), name)
        source = _SOURCES.get(module.rpartition(".")[2])
        if source is not None:
            _cite(value, source)
        setattr(sys.modules[module], name, value)
        return value

    return get


def _cite(value: object, source: Source) -> None:
    """Appends the citation to the docstring of a function or class that the method's home defines."""
    if not (inspect.isfunction(value) or inspect.isclass(value)) or not value.__module__.startswith(source.module):
        return
    if value.__doc__ and "\n    Source:\n" not in value.__doc__:
        value.__doc__ = f"{value.__doc__.rstrip()}\n\n    Source:\n      {source.citation}.\n    "


def catalogue(family: str | None = None) -> tuple[Source, ...]:
    """Returns every published method of this library, by family and name.

    Args:
      family: one family only, such as "low_rank".

    Example:
      >>> import subspace_jax as sj
      >>> [s.year for s in sj.catalogue("low_rank") if s.slug == "pissa"]
      [2024]
    """
    found = [source for source in _SOURCES.values() if family in (None, source.family)]
    return tuple(sorted(found, key=lambda source: (source.family, source.slug)))
