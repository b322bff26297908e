"""Parts that all descriptions of trees share: the header, the version, and the comparison with stored arrays.

A description is a JSON object. Its tree consists of nodes, each with the field "node": "none", "value" (a Python
value), "array" (shape, dtype, and where the numbers are), "dict", "list", "tuple", "namedtuple", or "weight" (class,
static fields, data fields). The numbers of an array are stored under the array's slash-joined path, or are those of a
leaf of the original parameters, which is named with its hash, but for a few entries that may be stored, or follow from
the weight's static fields and are told by their hash.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from subspace_jax.core import Weight
from subspace_jax.io._array import ArraySpec
from subspace_jax.io._errors import ManifestError

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Regenerated:
    """An array that is not stored because it follows from static fields of its weight.

    Attributes:
      make: returns it, or raises ManifestError where its hash is not the recorded one.
    """

    make: Callable[[], Any]


# Called with an array's path, its spec, and where the array is not stored: path and hash of the base leaf, or how it is
# made again.
MakeLeaf = Callable[[str, ArraySpec, "tuple[str, str] | Regenerated | None"], Any]


def header(name: str) -> dict[str, Any]:
    """Returns the fields that every file of this library begins with."""
    libraries = {}
    for library in ("subspace-jax", "jax", "flax", "optax", "orbax-checkpoint", "safetensors"):
        try:
            libraries[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            libraries[library] = "unknown"
    return {"format": name, "format_version": FORMAT_VERSION, "libraries": libraries}


def check_header(manifest: Any, name: str) -> None:
    """Raises ManifestError unless a manifest is of this format and of a version that is known."""
    if not isinstance(manifest, dict) or manifest.get("format") != name:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ManifestError(f"The manifest is of format {str(found)[:40]!r}, expected {name!r}.")
    version = manifest.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ManifestError(
            f"The manifest has format_version {str(version)[:40]}; this version of the library reads 1 to "
            f"{FORMAT_VERSION}. It was written by {str(manifest.get('libraries'))[:200]}."
        )


def join(path: str, key: Any) -> str:
    """Returns the path of a child."""
    return f"{path}/{key}" if path else str(key)


def static_names(cls: type[Weight]) -> tuple[str, ...]:
    """Returns the names of a weight's static fields."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("static"))


def differences(expected: Mapping[str, ArraySpec], found: Mapping[str, ArraySpec]) -> list[str]:
    """Returns one line for each array that is missing, extra, or of another shape or dtype."""
    lines = [f"{name!r} is missing, expected {spec}" for name, spec in expected.items() if name not in found]
    lines += [f"{name!r} is not expected, holds {spec}" for name, spec in found.items() if name not in expected]
    for name, want in expected.items():
        have = found.get(name, want)
        if (want.shape, want.dtype, want.key) != (have.shape, have.dtype, have.key):
            lines.append(f"{name!r} holds {have}, expected {want}")
    return lines
