"""Converts static fields of stand-in weights to JSON and back, checked against the fields' annotations."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.io._errors import ManifestError


def encode(value: Any, where: str) -> Any:
    """Returns a static value as JSON.

    Args:
      value: None, a bool, number, string, dtype, a tuple of such, or a frozen dataclass of such.
      where: what to call the value in errors.

    Raises:
      ManifestError: the value is of another kind.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # JSON has no words for these, and Python's own are refused by other readers.
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, np.dtype):
        return {"dtype": dtype_name(value, where)}
    if type(value) is tuple:
        return {"tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value) if f.compare
        }
        return {"dataclass": type(value).__name__, "fields": fields}
    raise ManifestError(
        f"{where}: a static value of type {type(value).__name__} cannot be saved. Static fields hold None, bool, int, "
        "float, str, np.dtype, tuples of these, and frozen dataclasses of these; arrays belong in data fields."
    )


def decode(value: Any, hint: Any, where: str) -> Any:
    """Returns the static value of some JSON; the inverse of `encode`.

    Args:
      value: what `encode` gave.
      hint: the field's annotation. Only dataclasses that it names are made.
      where: what to call the value in errors.

    Raises:
      ManifestError: the JSON is not of this form, or does not fit the annotation.
    """
    decoded = _decode(value, hint, where)
    if not _fits(decoded, hint):
        raise ManifestError(f"{where}: holds {decoded!r}, expected {_words(hint)}.")
    return decoded


def _decode(value: Any, hint: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        match value:
            case {"float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
                return float(text)
            case {"dtype": str() as name, **rest} if not rest:
                return dtype_from_name(name, where)
            case {"tuple": list() as items, **rest} if not rest:
                # The element's annotation is checked with the whole tuple's.
                return tuple(_decode(item, hint, f"{where}[{i}]") for i, item in enumerate(items))
            case {"dataclass": str() as name, "fields": dict() as fields, **rest} if not rest:
                return _dataclass(name, fields, hint, where)
    raise ManifestError(f"{where}: {str(value)[:80]!r} is not a static value that this version knows.")


def _dataclass(name: str, fields: dict[str, Any], hint: Any, where: str) -> Any:
    cls = {c.__name__: c for c in _dataclasses_in(hint)}.get(name)
    if cls is None:
        raise ManifestError(f"{where}: holds a {name!r}, expected {_words(hint)}.")
    values = decode_fields(cls, tuple(f.name for f in dataclasses.fields(cls)), fields, where)
    return cls(**values)


def decode_fields(cls: type, names: tuple[str, ...], fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the decoded fields `names` of a dataclass.

    Raises:
      ManifestError: a field is unknown to this version of the class, or is missing and has no default.
    """
    if unknown := sorted(set(fields) - set(names)):
        raise ManifestError(
            f"{where}: {cls.__name__} has no static field {', '.join(map(repr, unknown))}, only "
            f"{', '.join(map(repr, names))}. Was it saved by a newer version of the library?"
        )
    required = {f.name for f in dataclasses.fields(cls) if not _has_default(f)} & set(names)
    if missing := sorted(required - set(fields)):
        raise ManifestError(f"{where}: {cls.__name__} misses its static field {', '.join(map(repr, missing))}.")
    hints = field_types(cls)
    return {n: decode(v, hints.get(n, Any), f"{where}.{n}") for n, v in fields.items()}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the annotations of a class, without its own where they name what only type checkers import."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {name: hint for base in reversed(cls.__bases__) for name, hint in field_types(base).items()}


def dtype_name(dtype: Any, where: str) -> str:
    """Returns the name of a dtype of numbers.

    Raises:
      ManifestError: the dtype is structured, of objects or of strings.
    """
    name = np.dtype(dtype).name
    if dtype_from_name(name, where) != dtype:
        raise ManifestError(f"{where}: dtype {dtype} cannot be saved; expected one of numbers in native byte order.")
    return name


def dtype_from_name(name: str, where: str) -> np.dtype:
    """Returns the dtype of a name such as "bfloat16".

    Raises:
      ManifestError: no dtype of numbers has this name.
    """
    try:
        dtype = jnp.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if (
        dtype is None
        or dtype.name != name
        or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
    ):
        raise ManifestError(f"{where}: {name[:40]!r} is no dtype of numbers that this version of JAX knows.")
    return dtype


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that are not understood."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_fits(item, args[0]) for item in value)
        return len(args) == len(value) and all(map(_fits, value, args))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and (hint in (bool, str, tuple, np.dtype) or dataclasses.is_dataclass(hint)):
        return isinstance(value, hint)
    return True


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for arg in typing.get_args(hint) for cls in _dataclasses_in(arg)]


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
