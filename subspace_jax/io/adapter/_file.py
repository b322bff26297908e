"""Saves adapters without their base in one safetensors file, and loads them onto the base again."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from subspace_jax.core import is_weight, leaves_with_paths, map_with_paths
from subspace_jax.io._array import ArraySpec, array_spec, on_host, to_stored
from subspace_jax.io._base import BaseArrays, digest
from subspace_jax.io._describe import describe_node
from subspace_jax.io._errors import AdapterFileError, ManifestError, listing
from subspace_jax.io._manifest import check_header, differences, header
from subspace_jax.io._rebuild import array_nodes, concrete_leaf, rebuild_node
from subspace_jax.io._safetensors import NATIVE_DTYPES, read_safetensors, write_safetensors
from subspace_jax.io.adapter._checks import (
    base_hashes,
    check_links,
    check_paths,
    check_stand_ins,
    checksum,
    refuse_base,
    shape_of,
)

_FORMAT = "subspace_jax.adapter"
_KEY = "subspace_jax"
_CHECKSUM = "subspace_jax.sha256"


def save_adapter(path: str | os.PathLike[str], adapted: Any, *, base: Any = None) -> pathlib.Path:
    """Writes what adaptation added to the parameters into one safetensors file, atomically.

    Tensors are named by their slash-joined paths; a manifest in the file's metadata tells how the stand-in weights
    are made of them, and a checksum of manifest and tensors stands beside it. Arrays outside stand-in weights are
    recorded by shape, dtype and hash, and stored where they differ from `base`.

    Args:
      path: the file; its folder must exist.
      adapted: a tree with stand-in weights, trained or not.
      base: the parameters that `adapt` was given, whose hashes are recorded. Frozen arrays whose bytes equal theirs
        are left out of the file; of those that differ in few entries (LIFT's after a new selection) these entries are
        stored, and others (the residual of PiSSA, moved batch statistics) whole. Without it, the frozen arrays of all
        stand-in weights are stored, and nothing is known of the base they were made for.

    Returns:
      The path of the file.

    Raises:
      AdapterFileError: nothing is adapted, `base` is another tree, a weight reads arrays that another one stores
        which `adapted` does not hold, or the file cannot be written.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}
      >>> adapted = sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> path = save_adapter(pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors"), adapted, base=params)
      >>> list(read_safetensors(path)[0])
      ['w/a', 'w/b']
      >>> bool((load_adapter(path, params)["w"].a == adapted["w"].a).all())
      True
    """
    try:
        manifest, tensors = _pack(adapted, BaseArrays(base, sparse=True), has_base=base is not None)
    except ManifestError as error:
        raise AdapterFileError(f"{os.fspath(path)}: nothing was written: {error}") from error
    text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
    write_safetensors(path, tensors, {_KEY: text, _CHECKSUM: checksum(text, tensors)})
    return pathlib.Path(path)


def load_adapter(path: str | os.PathLike[str], base_params: Any, *, verify: bool = True) -> Any:
    """Loads the adapters of a file onto the parameters that they were made for.

    Args:
      path: a file written by `save_adapter`.
      base_params: the parameters that were adapted; any tree with the same paths.
      verify: compare the hashes of the parameters too, not only shapes and dtypes. Without it, adapters can be put
        on parameters with other values, on purpose.

    Returns:
      A tree of the structure of `base_params` with stand-in weights. What the file left out is taken from
      `base_params` without a copy.

    Raises:
      AdapterFileError: the file is damaged or hostile, a tensor is missing, extra or wrongly shaped, or the
        parameters are not those that were adapted. Files of earlier versions have no checksum, so their numbers
        cannot be checked.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((6, 4))}
      >>> adapted = sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> path = save_adapter(pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors"), adapted, base=params)
      >>> loaded = load_adapter(path, params)
      >>> bool((loaded["w"].a == adapted["w"].a).all()), loaded["w"].base is params["w"]
      (True, True)
    """
    tensors, metadata = read_safetensors(path)
    if _KEY not in metadata:
        raise AdapterFileError(
            f"{path}: has no {_KEY!r} manifest in its metadata, so it was not written by save_adapter. Read its "
            "tensors with read_safetensors."
        )
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != checksum(metadata[_KEY], tensors):
        raise AdapterFileError(
            f"{path}: its bytes are not those that were written, by the checksum that it holds. The file is damaged: "
            "copy or download it again, or save the adapter anew."
        )
    try:
        nodes, fingerprints = _nodes(metadata[_KEY])
        base = BaseArrays(base_params)
        names = _stored_names(nodes, base)
        check_paths(nodes, base.leaves, "the file", "the parameters")
        leaves = _unpack(nodes, tensors, base, fingerprints if verify else {}, verify)
    except ManifestError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    return map_with_paths(lambda name, _: leaves[str(names.get(name, name))], base_params)


def _stored_names(nodes: Mapping[str, Any], base: BaseArrays) -> dict[str, str]:
    """What a file calls paths that had another name then; the base arrays get that name too.

    Once the variables of Flax NNX had a name `value` of their own.
    """
    names = {path: f"{path}/value" for path in base.leaves if path not in nodes and f"{path}/value" in nodes}
    for path, name in names.items():
        base.leaves[name] = base.leaves.pop(path)
    return names


def _pack(adapted: Any, base: BaseArrays, has_base: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    leaves = leaves_with_paths(adapted)
    nodes: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    if not any(is_weight(leaf) for _, leaf in leaves):
        raise ManifestError("the tree holds no stand-in weight, so there is nothing of adapters to save.")
    for path, leaf in leaves:
        if path in nodes:
            raise ManifestError(
                f"{path!r} is the path of two leaves: a key of some dict is empty or holds a slash. Rename it."
            )
        if is_weight(leaf):
            shape_of(leaf, path)
        elif not hasattr(leaf, "dtype"):
            raise ManifestError(f"{path}: holds a {type(leaf).__name__}, expected an array or a stand-in weight.")
        if has_base or is_weight(leaf):
            nodes[path] = describe_node(leaf, arrays, base, path)
        else:
            spec = array_spec(leaf, path).to_json()
            nodes[path] = {"node": "array", **spec, "base": path, "sha256": digest(leaf, path)}
    check_links(adapted)
    fingerprints = {}
    if has_base:
        check_paths(nodes, base.leaves, "the adapted tree", "base")
        check_stand_ins(dict(leaves), base)
        fingerprints = base_hashes(dict(leaves), nodes, base)
    tensors = {}
    for name, value in arrays.items():
        spec = array_spec(value, name)
        tensors[name] = on_host(to_stored(value, spec), name).view(_file_dtype(spec))
    return {**header(_FORMAT), "leaves": nodes, "base": fingerprints}, tensors


def _unpack(
    nodes: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base: BaseArrays,
    fingerprints: Mapping[str, str],
    verify: bool,
) -> dict[str, Any]:
    stored: dict[str, ArraySpec] = {}
    references: dict[str, tuple[ArraySpec, tuple[str, str]]] = {}
    for path, node in nodes.items():
        here, there = array_nodes(node, path)
        stored |= here
        references |= there
    expected = {name: ArraySpec(spec.shape, _file_dtype(spec)) for name, spec in stored.items()}
    found = {name: ArraySpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if wrong := differences(expected, found):
        raise ManifestError(f"the tensors are not those of the file's own manifest:{listing(wrong)}")
    wrong = base.check(((path, spec, sha) for spec, (path, sha) in references.values()), verify=verify)
    refuse_base(wrong)
    arrays = {name: tensors[name].view(spec.stored_dtype) for name, spec in stored.items()}
    leaves = {path: rebuild_node(node, path, concrete_leaf(arrays, base)) for path, node in nodes.items()}
    check_stand_ins(leaves, base)
    refuse_base(
        [
            f"{path!r} has other numbers in the base tree than when this was saved"
            for path, recorded in fingerprints.items()
            if base.digest(path) != recorded
        ]
    )
    return leaves


def _file_dtype(spec: ArraySpec) -> np.dtype:
    """The dtype of an array in the file: that of its bytes where the format has no word for a one-byte dtype."""
    if spec.stored_dtype in NATIVE_DTYPES or spec.stored_dtype.itemsize > 1:
        return spec.stored_dtype
    return np.dtype(np.uint8)


def _nodes(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What a manifest says of the leaves, and the hashes of adapted arrays of the base."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is no JSON: {str(error)[:100]}.") from error
    check_header(manifest, _FORMAT)
    nodes = manifest.get("leaves")
    if not isinstance(nodes, dict):
        raise ManifestError("the manifest lists no leaves.")
    fingerprints = manifest.get("base", {})
    if not isinstance(fingerprints, dict) or not fingerprints.keys() <= nodes.keys():
        raise ManifestError(f"{str(fingerprints)[:80]!r} does not tell the hashes of adapted arrays.")
    return nodes, fingerprints
