"""Converts a training state to a manifest and a flat dict of arrays, and back."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from subspace_jax.core import OptState, PyTree, leaves_with_paths
from subspace_jax.io._array import ArraySpec, array_spec, check_representable, empty, has_entries, to_stored
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._describe import describe_node
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io._manifest import check_header, differences, header
from subspace_jax.io._rebuild import array_nodes, concrete_leaf, rebuild_node, regenerated_specs

_FORMAT = "subspace_jax.checkpoint"
_NOTHING = BaseArrays(None)


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: the step it was saved at.
      adapted: the tree of parameters with its stand-in weights.
      opt_state: the optimizer's state; None if none was saved or asked for.
      extra: what else was saved, such as random keys and the position in the data.
    """

    step: int
    adapted: Any
    opt_state: Any = None
    extra: Any = None


def pack(state: Checkpoint, base: BaseArrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the manifest of a state and its arrays as they go into a file, by section and path.

    Raises:
      ManifestError: the state holds something that cannot be saved.
    """
    parts: dict[str, dict[str, Any]] = {"adapted": {}, "opt_state": {}, "extra": {}}
    manifest = {
        **header(_FORMAT),
        "step": check_step(state.step),
        "adapted": describe_node(state.adapted, parts["adapted"], base),
        "opt_state": None if state.opt_state is None else _describe_leaves(state.opt_state, parts["opt_state"]),
        "extra": describe_node(state.extra, parts["extra"], _NOTHING),
    }
    arrays = {}
    for section, found in parts.items():
        for path, value in found.items():
            spec = array_spec(value, f"{section}/{path}")
            if isinstance(value, jax.ShapeDtypeStruct):
                raise ManifestError(f"{section}/{path}: is abstract, so it has no numbers to save.")
            if has_entries(spec):
                arrays[f"{section}/{path}"] = to_stored(value, spec)
    return manifest, arrays


def check_step(step: Any) -> int:
    """Returns a step as a Python int; raises ManifestError unless it is a non-negative integer."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if isinstance(step, bool) or number < 0:
        raise ManifestError(f"step={step!r}: expected a non-negative integer.")
    return number


def _describe_leaves(opt_state: OptState, arrays: dict[str, Any]) -> dict[str, Any]:
    """The nodes of an optimizer's leaves; its containers come from the optimizer again."""
    nodes: dict[str, Any] = {}
    for path, value in _leaves(opt_state):
        if path in nodes:
            raise ManifestError(
                f"opt_state: {path!r} is the path of two leaves; rename a key that is empty or holds a slash."
            )
        nodes[path] = describe_node(value, arrays, _NOTHING, path)
        if nodes[path]["node"] not in ("array", "value"):
            raise ManifestError(
                f"opt_state: {path}: a {type(value).__name__} cannot be saved, only arrays and numbers."
            )
    return nodes


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Path and value of every array; the fields of stand-in weights by their own names."""
    found = []
    for path, leaf in leaves_with_paths(tree):
        inside = jax.tree_util.tree_leaves_with_path(leaf)
        found.extend(("/".join(filter(None, (path, _field_path(keys)))), value) for keys, value in inside)
    return found


def _field_path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _stored_name(nodes: Mapping[str, Any], path: str) -> str:
    """What a file calls a leaf: once the variables of Flax NNX had a name `value` of their own."""
    old = f"{path}/value"
    return old if path not in nodes and old in nodes else path


def check_manifest(manifest: Any) -> None:
    """Raises ManifestError unless a manifest is one of a checkpoint."""
    check_header(manifest, _FORMAT)
    check_step(manifest.get("step"))
    if not {"adapted", "opt_state", "extra"} <= manifest.keys():
        raise ManifestError("The manifest does not describe adapted, opt_state and extra.")
    if not isinstance(manifest["opt_state"], dict | None):
        raise ManifestError("The manifest does not list the leaves of opt_state.")


def stored_specs(manifest: Mapping[str, Any], section: str) -> dict[str, ArraySpec]:
    """Returns the specs of the arrays of one section by path, those without entries included."""
    if section != "opt_state":
        return array_nodes(manifest[section])[0]
    nodes: Mapping[str, Any] = manifest["opt_state"] or {}
    return {name: spec for path, node in nodes.items() for name, spec in array_nodes(node, path)[0].items()}


def check_base(manifest: Mapping[str, Any], base: BaseArrays) -> None:
    """Raises ManifestError unless `base` holds the arrays that the checkpoint left out."""
    references = array_nodes(manifest["adapted"])[1].values()
    if wrong := base.check((path, spec, sha) for spec, (path, sha) in references):
        raise ManifestError(
            f"Arrays were left out of the checkpoint, and base= does not hold them:{listing(wrong)}\nPass the "
            "parameters that the checkpoint was saved with as base=."
        )


def check_template(manifest: Mapping[str, Any], like: PyTree) -> None:
    """Raises ManifestError unless an optimizer's state has the leaves that were saved."""
    if manifest["opt_state"] is None:
        raise ManifestError("The checkpoint was saved without opt_state, and like= asks for one.")
    expected: dict[str, Any] = {}
    for path, leaf in _leaves(like):
        expected[path] = array_spec(leaf, path) if hasattr(leaf, "dtype") else type(leaf).__name__
    nodes = manifest["opt_state"]
    saved: dict[str, Any] = {path: type(node.get("value")).__name__ for path, node in nodes.items()}
    saved |= stored_specs(manifest, "opt_state")
    for path in expected:
        saved |= {path: saved.pop(name)} if (name := _stored_name(saved, path)) in saved else {}
    arrays = {p: s for p, s in expected.items() if isinstance(s, ArraySpec) and isinstance(saved.get(p, s), ArraySpec)}
    others = expected.keys() - arrays.keys()
    wrong = differences(arrays, {p: s for p, s in saved.items() if p not in others})
    for path in (p for p in expected if p in others):
        if path not in saved:
            wrong.append(f"{path!r} is missing, expected {expected[path]}")
        elif saved[path] != expected[path]:
            wrong.append(f"{path!r} holds {saved[path]}, expected {expected[path]}")
    if wrong:
        raise ManifestError(
            f"The saved optimizer state is not that of like=:{listing(wrong)}\nPass "
            "like=optimizer.init(trainable) of the optimizer and the adapters that were saved. Some optimizers "
            "change the dtype of their state at the first update: then pass the state after one, by jax.eval_shape."
        )


def placements(shardings: PyTree, specs: Mapping[str, ArraySpec]) -> dict[str, jax.sharding.Sharding]:
    """Returns the sharding of each array of the adapted tree that is given one.

    Args:
      shardings: one for all, a tree of the adapted tree's structure with None where the default serves, or None.
      specs: the arrays by path.

    Raises:
      ManifestError: a sharding is given for an array that does not exist, or does not divide it.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        given = {path: shardings for path, spec in specs.items() if spec.kind == "jax"}
    else:
        is_leaf = lambda v: isinstance(v, jax.sharding.Sharding)  # noqa: E731
        leaves = jax.tree_util.tree_leaves_with_path(shardings, is_leaf=is_leaf)
        given = {_field_path(path): leaf for path, leaf in leaves}
    wrong = []
    for path, sharding in given.items():
        if path not in specs:
            wrong.append(f"{path!r} is no array of the checkpoint")
        elif not isinstance(sharding, jax.sharding.Sharding):
            wrong.append(f"{path!r} has a {type(sharding).__name__}, expected a jax.sharding.Sharding")
        else:
            try:
                sharding.shard_shape(specs[path].shape)
            except (ValueError, IndexError) as error:  # the latter for more names than axes
                wrong.append(f"{path!r} of shape {specs[path].shape} cannot be laid out so: {error}")
    if wrong:
        raise ManifestError(f"shardings= does not fit the checkpoint:{listing(wrong)}")
    return given


def template_placements(like: PyTree) -> dict[str, jax.sharding.Sharding]:
    """Returns the sharding of each leaf of an optimizer's state that was placed on purpose."""
    found = {}
    for path, leaf in _leaves(like):
        placed = leaf.committed if isinstance(leaf, jax.Array) else isinstance(leaf, jax.ShapeDtypeStruct)
        if placed and leaf.sharding is not None:
            found[path] = leaf.sharding
    return found


def unpack(
    manifest: Mapping[str, Any],
    arrays: Mapping[str, Any],
    like: PyTree,
    base: BaseArrays,
    places: Mapping[str, jax.sharding.Sharding],
) -> Checkpoint:
    """Returns the state of a manifest.

    Args:
      manifest: a checked one.
      arrays: the stored arrays by section and path, those without entries left out.
      like: a state of the optimizer, for its containers; None to leave the optimizer's state out.
      base: holds what was left out of the checkpoint.
      places: shardings by section and path, of arrays that are made again or taken from the base.
    """

    def leaf_of(section: str) -> Any:
        specs = stored_specs(manifest, section)
        found = {
            path: arrays[f"{section}/{path}"] if has_entries(spec) else empty(spec, path)
            for path, spec in specs.items()
        }
        inside = {name.partition("/")[2]: s for name, s in places.items() if name.startswith(f"{section}/")}
        return concrete_leaf(found, base, inside)

    opt_state = None
    if like is not None:
        leaf = leaf_of("opt_state")
        nodes = manifest["opt_state"]
        names = [_stored_name(nodes, path) for path, _ in _leaves(like)]
        leaves = [rebuild_node(nodes[name], name, leaf) for name in names]
        opt_state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Checkpoint(
        step=manifest["step"],
        adapted=rebuild_node(manifest["adapted"], "", leaf_of("adapted")),
        opt_state=opt_state,
        extra=rebuild_node(manifest["extra"], "", leaf_of("extra")),
    )


def unpack_abstract(manifest: Mapping[str, Any]) -> Checkpoint:
    """Returns the state of a manifest without numbers, and without the optimizer's."""

    def leaf(name: str, spec: ArraySpec, reference: Any) -> Any:
        del reference
        return spec.abstract(name)

    adapted, extra = (rebuild_node(manifest[section], "", leaf) for section in ("adapted", "extra"))
    return Checkpoint(step=manifest["step"], adapted=adapted, extra=extra)


def placeable_arrays(manifest: Mapping[str, Any], wanted: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Returns the arrays of the adapted tree that a sharding can be asked for: read, made again or of the base."""
    read = {name.partition("/")[2]: spec for name, spec in wanted.items() if name.startswith("adapted/")}
    of_base = {path: spec for path, (spec, _) in array_nodes(manifest["adapted"])[1].items()}
    return read | regenerated_specs(manifest["adapted"]) | of_base


def wanted_arrays(manifest: Mapping[str, Any], *, with_opt_state: bool) -> dict[str, ArraySpec]:
    """Returns what to read from the file: specs by section and path.

    Raises:
      ManifestError: this process cannot hold one of them.
    """
    sections = ("adapted", "opt_state", "extra") if with_opt_state else ("adapted", "extra")
    wanted = {}
    for section in sections:
        for path, spec in stored_specs(manifest, section).items():
            check_representable(spec, f"{section}/{path}")
            if has_entries(spec):
                wanted[f"{section}/{path}"] = spec
    return wanted


def compare_stored(manifest: Mapping[str, Any], found: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
    """Raises ManifestError unless a file holds exactly the arrays of its manifest."""
    expected = {
        f"{section}/{path}": ArraySpec(spec.shape, spec.stored_dtype)
        for section in ("adapted", "opt_state", "extra")
        for path, spec in stored_specs(manifest, section).items()
        if has_entries(spec)
    }
    held = {name: ArraySpec(tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in found.items()}
    if wrong := differences(expected, held):
        raise ManifestError(f"The arrays are not those of the manifest:{listing(wrong)}")
