"""Converts PEFT's `trainable_token_indices`, rows of an embedding that are replaced, to a sparse weight."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Weight
from subspace_jax.io._errors import ManifestError
from subspace_jax.io.peft._checks import check_shapes
from subspace_jax.io.peft._reading import Reading
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import SparseDelta

_KEY = "trainable_token_indices"


def unpack_rows(reading: Reading) -> dict[str, Weight]:
    """Returns the tables of which a file replaces rows, by path; only those rows learn.

    Where the model reads the table as its head too, PEFT replaces the rows of both, as this library does.

    Raises:
      ManifestError: the rows that the config names are not those of the file.
    """
    given = reading.settings.values.get(_KEY)
    if not reading.found.rows and not given:
        return {}
    if not reading.found.rows or not given:
        raise ManifestError(
            f"{_KEY}={str(given)[:60]}, and the file has such rows for {sorted(reading.found.rows) or 'none'}."
        )
    if isinstance(given, dict) and (absent := [n for n in given if not any(_names(n, m) for m in reading.found.rows)]):
        raise ManifestError(f"{_KEY} names {absent[0]!r}, of which the file has no rows.")
    weights: dict[str, Weight] = {}
    for module, values in reading.found.rows.items():
        place = reading.place(module)
        array = reading.base.leaves[place.path]
        if place.rule.kind != "embedding" or place.depth:
            raise ManifestError(f"{_KEY}: {place.path} is a {place.rule.kind} or a stack, expected one embedding.")
        rows = _indices(given, module, array.shape[0])
        check_shapes(module, {"rows": values}, {"rows": (len(rows), array.shape[1])}, place)
        order = np.argsort(rows)
        columns = np.arange(array.shape[1])
        weights[place.path] = SparseDelta(
            base=array,
            indices=jnp.asarray((rows[order, None] * array.shape[1] + columns).reshape(-1), jnp.int32),
            values=jnp.asarray(values[order].reshape(-1), wide_dtype(array.dtype)),
            **reading.fields(place),
            trainable=("values",),
            method="trainable_tokens",
        )
    return weights


def _names(name: Any, module: str) -> bool:
    return isinstance(name, str) and (module == name or module.endswith(f".{name}"))


def _indices(given: Any, module: str, count: int) -> np.ndarray:
    """The rows of a module that the config names."""
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if _names(name, module)), None)
    whole = isinstance(given, list) and all(type(row) is int and 0 <= row < count for row in given)
    if not whole or len(set(given)) != len(given):
        raise ManifestError(
            f"{_KEY}={str(given)[:60]} for module {module!r}: expected different whole numbers below {count}."
        )
    return np.asarray(given, np.int64)
