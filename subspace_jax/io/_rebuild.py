"""Rebuilds a tree from its description, without the code that made the original."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax.weights  # noqa: F401  (enters every stand-in weight of the library into Weight.classes)
from subspace_jax.core import Weight, nearest, put
from subspace_jax.io._array import ArraySpec, array_spec, from_stored, on_host
from subspace_jax.io._base import BaseArrays, digest
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io._manifest import MakeLeaf, Regenerated, check_header, differences, join, static_names
from subspace_jax.io._static import decode, decode_fields, encode


def rebuild(manifest: Any, arrays: Mapping[str, Any], base: Any = None) -> Any:
    """Returns the tree of a description; the inverse of `describe`.

    Only the classes of the stand-in weights are needed, never the methods or models that made them. A named tuple
    whose module is not loaded comes back as a plain one of the same name and fields.

    Args:
      manifest: what `describe` returned.
      arrays: arrays by path; missing, extra or wrongly shaped ones are errors.
      base: the parameters that arrays were left out for.

    Raises:
      ManifestError: the description is damaged or of a newer version, or does not fit the arrays.
    """
    check_header(manifest, "subspace_jax.tree")
    node = manifest.get("tree")
    stored, references = array_nodes(node)
    found = {name: array_spec(value, name) for name, value in arrays.items()}
    wrong = differences(stored, found)
    leaves = BaseArrays(base)
    wrong += leaves.check((path, spec, sha) for spec, (path, sha) in references.values())
    if wrong:
        raise ManifestError(f"The arrays are not those of the manifest:{listing(wrong)}")

    def leaf(name: str, spec: ArraySpec, reference: tuple[str, str] | Regenerated | None) -> Any:
        if isinstance(reference, Regenerated):
            return reference.make()
        return arrays[name] if reference is None else leaves.array(reference[0])

    return rebuild_node(node, "", leaf)


def array_nodes(node: Any, path: str = "") -> tuple[dict[str, ArraySpec], dict[str, tuple[ArraySpec, tuple[str, str]]]]:
    """Returns the specs of the stored arrays by path, and spec and reference of those left out for the base.

    Raises:
      ManifestError: the description is damaged.
    """
    stored: dict[str, ArraySpec] = {}
    references: dict[str, tuple[ArraySpec, tuple[str, str]]] = {}

    def leaf(name: str, spec: ArraySpec, reference: tuple[str, str] | Regenerated | None) -> Any:
        if name in stored or name in references:
            raise ManifestError(f"{name!r} is described twice.")
        if reference is None:
            stored[name] = spec
        elif not isinstance(reference, Regenerated):
            references[name] = spec, reference
        return spec.abstract(name)

    rebuild_node(node, path, leaf)
    return stored, references


def regenerated_specs(node: Any) -> dict[str, ArraySpec]:
    """Returns the specs of the arrays that are left out because their weights make them again, by path."""
    found: dict[str, ArraySpec] = {}

    def leaf(name: str, spec: ArraySpec, reference: tuple[str, str] | Regenerated | None) -> Any:
        if isinstance(reference, Regenerated):
            found[name] = spec
        return spec.abstract(name)

    rebuild_node(node, "", leaf)
    return found


def rebuild_node(node: Any, path: str, leaf: MakeLeaf) -> Any:
    """Returns the tree of a node, with what `leaf(path, spec, reference)` gives in place of each array."""
    try:
        return _rebuild(node, path, leaf)
    except RecursionError:
        raise ManifestError(f"{path or 'the tree'}: the manifest is nested too deeply.") from None


def _rebuild(node: Any, path: str, leaf: MakeLeaf) -> Any:
    match node:
        case {"node": "none"}:
            return None
        case {"node": "value", "value": value}:
            return decode(value, Any, path)
        case {
            "node": "array",
            "base": str() as base,
            "sha256": str() as sha256,
            "changed_at": dict() as at,
            "changed_to": dict() as to,
            **rest,
        }:
            spec = ArraySpec.from_json(rest, path)
            positions, values = (_rebuild(n, join(path, k), leaf) for k, n in (("changed_at", at), ("changed_to", to)))
            return _changed(leaf(path, spec, (base, sha256)), positions, values, spec, path)
        case {"node": "array", "base": str() as base, "sha256": str() as sha256, **rest}:
            return leaf(path, ArraySpec.from_json(rest, path), (base, sha256))
        case {"node": "array", "number": number, **rest}:
            spec, value = ArraySpec.from_json(rest, path), decode(number, float, path)
            return leaf(path, spec, Regenerated(lambda: jnp.asarray(value, spec.dtype)))
        case {"node": "array", **rest}:
            return leaf(path, ArraySpec.from_json(rest, path), None)
        case {"node": "dict", "items": list() as items}:
            return _rebuild_dict(items, path, leaf)
        case {"node": "list" | "tuple" as kind, "items": list() as items}:
            children = [_rebuild(item, join(path, i), leaf) for i, item in enumerate(items)]
            return children if kind == "list" else tuple(children)
        case {
            "node": "namedtuple",
            "class": str() as name,
            "fields": list() as fields,
            "items": list() as items,
        }:
            cls = _named_tuple(name, tuple(map(str, fields)), path)
            if len(fields) == len(items):
                return cls(*(_rebuild(item, join(path, n), leaf) for n, item in zip(cls._fields, items, strict=True)))
        case {"node": "weight", "class": str() as name, "static": dict() as static, "data": dict() as data}:
            return _rebuild_weight(name, static, data, path, leaf)
    raise ManifestError(f"{path or 'the tree'}: {str(node)[:80]!r} is no node of a manifest that this version knows.")


def _changed(array: Any, positions: Any, values: Any, spec: ArraySpec, path: str) -> Any:
    """The array with other values in some entries; an abstract one as it is."""
    at, to = (getattr(v, "dtype", None) for v in (positions, values))
    shapes = [getattr(v, "shape", None) for v in (positions, values)]
    if at not in (np.int32, np.int64) or to != spec.dtype or shapes[0] != shapes[1] or len(shapes[0] or ()) != 1:
        raise ManifestError(f"{path}: its changed entries are {at}{shapes[0]} and {to}{shapes[1]}, which do not fit.")
    if isinstance(array, jax.ShapeDtypeStruct):
        return array
    host, places = np.array(on_host(array, path), order="C"), np.asarray(positions)
    if places.size and not 0 <= places.min() <= places.max() < host.size:
        raise ManifestError(f"{path}: has changed entries outside of its shape {spec.shape}.")
    host.reshape(-1)[places] = np.asarray(values)
    if not isinstance(array, jax.Array):
        return host
    return jax.device_put(host, array.sharding) if array.committed else jnp.asarray(host)


def _rebuild_dict(items: list[Any], path: str, leaf: MakeLeaf) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for item in items:
        if not (isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)) or item[0] in out:
            raise ManifestError(f"{path or 'the tree'}: {str(item)[:80]!r} is not an entry of a dict, or a second one.")
        out[item[0]] = _rebuild(item[1], join(path, item[0]), leaf)
    return out


def _rebuild_weight(name: str, static: dict[str, Any], data: dict[str, Any], path: str, leaf: MakeLeaf) -> Weight:
    cls = Weight.classes.get(name)
    if cls is None or inspect.isabstract(cls):
        raise ManifestError(
            f"{path}: the stand-in weight {name[:40]!r} is not known here; nearest are "
            f"{nearest(name[:40], Weight.classes)}. Import the module that defines it before loading."
        )
    static, data = _with_numbers(cls, static, data, path)
    fields: dict[str, Any] = decode_fields(cls, static_names(cls), static, path)
    if unknown := sorted(set(data) - set(cls.data_names())):
        raise ManifestError(f"{path}: {name} has no field {', '.join(map(repr, unknown))}, only {cls.data_names()}.")
    if foreign := sorted(set(fields["trainable"]) - set(cls.data_names())):
        raise ManifestError(f"{path}: {name} cannot train {', '.join(map(repr, foreign))}, only {cls.data_names()}.")
    made_again = {n: item for n, item in data.items() if isinstance(item, dict) and "regenerated" in item}
    if unknown := sorted(made_again.keys() - set(cls.regenerated)):
        raise ManifestError(f"{path}: {name} cannot make {', '.join(map(repr, unknown))} of its static fields.")
    parts = {n: _rebuild(item, join(path, n), leaf) for n, item in data.items() if n not in made_again}
    arguments: dict[str, Any] = dict.fromkeys(cls.data_names()) | parts | fields
    try:
        weight = cls(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path}: {name} refuses what the manifest gives it: {error}") from error
    whole = {n: _rebuild_regenerated(weight, n, item, join(path, n), leaf) for n, item in made_again.items()}
    return dataclasses.replace(weight, **whole) if whole else weight


def _with_numbers(
    cls: type[Weight], static: dict[str, Any], data: dict[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The static fields, and the data with the numbers that files of before have among the static ones."""
    named = cls.number_names()
    learning = static.get("trainable")
    # Of a partition both halves had the number; of what learns it is no part any more.
    names = learning.get("tuple") if isinstance(learning, dict) else None
    half = isinstance(names, list) and bool(data) and all(name in names for name in data)
    spec = ArraySpec((), np.dtype(jnp.result_type(float))).to_json()
    old = {n: decode(static[n], float, f"{path}.{n}") for n in named if n in static}
    nodes = {} if half else {n: {"node": "array", **spec, "number": encode(v, path)} for n, v in old.items()}
    return {n: v for n, v in static.items() if n not in named}, nodes | data


def _rebuild_regenerated(weight: Weight, name: str, node: dict[str, Any], path: str, leaf: MakeLeaf) -> Any:
    match node:
        case {"node": "array", "regenerated": str() as sha, **rest}:
            spec = ArraySpec.from_json(rest, path)
            return leaf(path, spec, Regenerated(lambda: _make_again(weight, name, spec, sha, path)))
    raise ManifestError(f"{path}: {str(node)[:80]!r} is no node of a manifest that this version knows.")


def _make_again(weight: Weight, name: str, spec: ArraySpec, sha: str, path: str) -> Any:
    """The field that the weight's static fields give, if it is the one that was saved."""
    try:
        planned = array_spec(jax.eval_shape(weight.regenerate)[name], path)
        if planned != spec:
            raise ManifestError(f"{path}: was saved as {spec}, and the weight's static fields give {planned}.")
        array = weight.regenerate()[name]
    except (TypeError, ValueError, KeyError, ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: the weight's static fields do not give it again: {str(error)[:200]}") from error
    if digest(array, path) != sha:
        raise ManifestError(
            f"{path}: was left out of the file because the {type(weight).__name__} draws it again, and what it draws "
            f"here has other numbers than were saved. The random generator of this JAX ({jax.__version__}) or its "
            "setting jax_threefry_partitionable is not that of the run. Load with those; the file names the version."
        )
    return array


def _named_tuple(name: str, fields: tuple[str, ...], path: str) -> Any:
    """The class of this name if its module is loaded; nothing is ever imported because a file says so."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == fields:
        return found
    try:
        return _plain_named_tuple(qualified.rpartition(".")[2], fields)
    except ValueError as error:
        raise ManifestError(f"{path or 'the tree'}: {name[:80]!r} is not a named tuple: {error}") from error


@functools.cache
def _plain_named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def concrete_leaf(
    arrays: Mapping[str, Any], base: BaseArrays, places: Mapping[str, jax.sharding.Sharding] | None = None
) -> MakeLeaf:
    """Returns a function that turns stored data into arrays, for `rebuild_node`.

    Args:
      arrays: stored data by path, where they belong already.
      base: holds what was left out for it.
      places: shardings of arrays that are made again or taken from the base, by path.
    """

    def leaf(name: str, spec: ArraySpec, reference: tuple[str, str] | Regenerated | None) -> Any:
        place = (places or {}).get(name)
        if isinstance(reference, Regenerated):
            return reference.make() if place is None else jax.device_put(reference.make(), place)
        if reference is None:
            return from_stored(arrays[name], spec, name)
        value = base.array(reference[0])
        return value if place is None else put(value, place)

    return leaf
