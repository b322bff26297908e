"""Describes a tree as JSON and a flat dict of arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from subspace_jax.core import Weight
from subspace_jax.io._array import array_spec
from subspace_jax.io._base import BaseArrays, digest
from subspace_jax.io._errors import ManifestError
from subspace_jax.io._manifest import header, join, static_names
from subspace_jax.io._static import encode


def describe(tree: Any, base: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a tree's description and its arrays.

    Arrays that a weight makes of its static fields (`Weight.regenerated`) are left out and described by their hash,
    unless they hold other numbers than those.

    Args:
      tree: dicts, lists, tuples, named tuples, None, stand-in weights, arrays, random keys, and Python values.
      base: the parameters that `adapt` was given. Frozen arrays whose bytes equal their leaf are left out of the
        arrays and described by its path and hash.

    Returns:
      `(manifest, arrays)`: a JSON object, and the arrays by slash-joined path.

    Raises:
      ManifestError: the tree holds something else.

    Example:
      >>> import jax.numpy as jnp
      >>> from subspace_jax.io import rebuild
      >>> manifest, arrays = describe({"layer": [jnp.zeros((2, 3)), None]})
      >>> list(arrays), manifest["format_version"]
      (['layer/0'], 1)
      >>> rebuild(manifest, arrays)["layer"][0].shape
      (2, 3)
    """
    arrays: dict[str, Any] = {}
    node = describe_node(tree, arrays, BaseArrays(base))
    return {**header("subspace_jax.tree"), "tree": node}, arrays


def describe_node(tree: Any, arrays: dict[str, Any], base: BaseArrays, path: str = "") -> dict[str, Any]:
    """Returns the node of a tree, or of its leaf at `path`, and enters its arrays by path."""
    try:
        return _Description(arrays, base).node(tree, path, path, frozen=True)
    except RecursionError:
        raise ManifestError(f"{path or 'the tree'}: containers are nested too deeply to be saved.") from None


@dataclasses.dataclass(frozen=True)
class _Description:
    arrays: dict[str, Any]
    base: BaseArrays

    def node(self, value: Any, path: str, leaf_path: str, *, frozen: bool) -> dict[str, Any]:
        """The node of a value; `leaf_path` is where the parameter tree has the leaf that the value is part of."""
        if value is None:
            return {"node": "none"}
        if isinstance(value, Weight):
            return self.weight(value, path, leaf_path)
        if isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
            return self.array(value, path, leaf_path, frozen)
        if isinstance(value, (bool, int, float, str)):
            return {"node": "value", "value": encode(value, path)}

        def child(key: Any, item: Any) -> dict[str, Any]:
            inside = join(path, key)
            return self.node(item, inside, inside if leaf_path == path else leaf_path, frozen=frozen)

        if type(value) is dict:
            for key in value:
                if type(key) not in (str, int):
                    raise ManifestError(f"{path or 'the tree'}: the dict key {key!r} is neither a str nor an int.")
            return {"node": "dict", "items": [[key, child(key, item)] for key, item in value.items()]}
        if type(value) in (list, tuple):
            return {"node": type(value).__name__, "items": [child(i, item) for i, item in enumerate(value)]}
        # A named tuple may have no fields, as optax.EmptyState.
        if isinstance(value, tuple) and (names := getattr(value, "_fields", None)) is not None:
            cls, fields = type(value), tuple(names)
            items = [child(name, item) for name, item in zip(fields, value, strict=True)]
            name = f"{cls.__module__}:{cls.__qualname__}"
            return {"node": "namedtuple", "class": name, "fields": list(fields), "items": items}
        raise ManifestError(
            f"{path or 'the tree'}: a {type(value).__module__}.{type(value).__name__} cannot be saved. A tree is made "
            "of dicts, lists, tuples, named tuples, arrays and stand-in weights: convert it first, for instance by "
            "nnx.to_pure_dict or flax.core.unfreeze."
        )

    def weight(self, weight: Weight, path: str, leaf_path: str) -> dict[str, Any]:
        cls = type(weight)
        if Weight.classes.get(cls.__name__) is not cls:
            raise ManifestError(
                f"{path}: two classes of stand-in weights are called {cls.__name__!r}; rename {cls.__module__}'s."
            )
        static = {n: encode(getattr(weight, n), f"{path}.{n}") for n in static_names(cls)}
        data = _regenerated(weight, path) | _numbers(weight, path)
        # What only stores an array has its parts in the parameters, too, where it stands there for the whole leaf.
        inside = (lambda name: join(leaf_path, name)) if weight.stored else (lambda _: leaf_path)
        data |= {
            name: self.node(value, join(path, name), inside(name), frozen=name not in weight.trainable)
            for name, value in weight.data_items()
            if name not in data
        }
        return {"node": "weight", "class": cls.__name__, "static": static, "data": data}

    def array(self, value: Any, path: str, leaf_path: str, frozen: bool) -> dict[str, Any]:
        if path in self.arrays:
            raise ManifestError(
                f"{path!r} is the path of two arrays: a key of some dict is empty or holds a slash. Rename it."
            )
        node = {"node": "array", **array_spec(value, path).to_json()}
        if frozen and self.base.holds(leaf_path, value):
            return {**node, "base": leaf_path, "sha256": self.base.digest(leaf_path)}
        if frozen and (changes := self.base.changes(leaf_path, value)) is not None:
            stored = {"changed_at": changes.positions, "changed_to": changes.values}
            inside = {
                name: self.array(array, join(path, name), leaf_path, frozen=False) for name, array in stored.items()
            }
            return {**node, "base": leaf_path, "sha256": self.base.digest(leaf_path), **inside}
        self.arrays[path] = value
        return node


def _numbers(weight: Weight, path: str) -> dict[str, Any]:
    """The nodes of fields of one frozen number, such as a scale, which stand in the description itself."""
    nodes = {}
    for name in set(weight.number_names()) - set(weight.trainable):
        value = getattr(weight, name)
        if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.ndim == 0:
            number = encode(float(np.asarray(value.addressable_data(0))), path)
            nodes[name] = {"node": "array", **array_spec(value, join(path, name)).to_json(), "number": number}
    return nodes


def _regenerated(weight: Weight, path: str) -> dict[str, Any]:
    """The nodes of the fields that hold exactly what the weight's static fields give."""
    candidates = {name: getattr(weight, name) for name in weight.regenerated}
    found = {
        name: value
        for name, value in candidates.items()
        if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_fully_addressable
    }
    specs = {name: array_spec(value, join(path, name)) for name, value in found.items()}
    made = weight.regenerate() if found else {}
    nodes = {}
    for name, value in found.items():
        where = join(path, name)
        if specs[name] == array_spec(made[name], where) and (sha := digest(value, where)) == digest(made[name], where):
            nodes[name] = {"node": "array", **specs[name].to_json(), "regenerated": sha}
    return nodes
