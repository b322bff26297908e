"""Converts fully trained arrays to PEFT's `modules_to_save` and `bias`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Full, Weight, is_weight
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io.peft._checks import (
    check_shapes,
    require_parts,
    same_of_all,
)
from subspace_jax.io.peft._layout import stack, unstack, whole_from_torch, whole_shape, whole_to_torch
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.io.peft._reading import Reading
from subspace_jax.io.peft._tensors import index_places, tensor_name, whole_per_leaf

_BIAS = {"LORA": "lora_only", "OFT": "oft_only", "RANDLORA": "randlora_only"}


def pack_full(
    leaves: Mapping[str, Any], places: Mapping[str, TensorPlace], adapted: set[str], method: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of arrays that train as they are, and the settings that go with them.

    Biases of adapted modules are PEFT's `bias`; every other such array makes its whole module one of
    `modules_to_save`, whose other arrays are stored too.

    Args:
      leaves: all of the tree, by path.
      places: of every leaf that the NameMap names.
      adapted: names of the modules whose weight is adapted.
      method: PEFT's name of their method.

    Raises:
      ManifestError: a module would have to be both adapted and saved whole, or PEFT would take others for it.
    """
    tensors: dict[str, np.ndarray] = {}
    whole: set[str] = set()
    for path, leaf in leaves.items():
        if not isinstance(leaf, Full):
            continue
        place = places[path]
        require_parts(path, leaf, "value")
        if place.rule.kind == "array":
            raise ManifestError(
                f"{path}: in PyTorch this array belongs to a module with others in it, which PEFT can only save whole. "
                "Leave it frozen, or export the whole model."
            )
        if place.rule.shared:
            raise ManifestError(
                f"{path}: the model reads this array in several places, and PEFT trains only {place.modules[0]}. Leave "
                "it frozen, or save the whole model."
            )
        for module, array in zip(place.modules, unstack(leaf.value, place, path), strict=True):
            if place.tensor == "bias" and module in adapted:
                tensors[tensor_name(module, "base_layer.bias")] = whole_to_torch(array, place)
            else:
                whole.add(module)
    settings: dict[str, Any] = {"bias": _BIAS[method] if tensors else "none"}
    index = index_places(places.values())
    for (module, tensor), (place, position) in index.items():
        if module not in whole:
            continue
        leaf = leaves[place.path]
        if is_weight(leaf) and not isinstance(leaf, Full):
            raise ManifestError(
                f"{place.path}: is a {type(leaf).__name__} in a module of which another array trains as it is. PEFT "
                "does either with a module: drop one of the two rules."
            )
        array = leaf.value if isinstance(leaf, Full) else leaf
        tensors[tensor_name(module, tensor)] = whole_to_torch(unstack(array, place, place.path)[position], place)
    _check_names(whole, {module for module, _ in index}, adapted)
    return tensors, settings | {"modules_to_save": sorted(whole) or None}


def _check_names(whole: set[str], known: set[str], adapted: set[str]) -> None:
    """Refuses names by which PEFT, which compares endings, would find other modules too."""
    wrong = []
    for name in sorted(whole):
        inside = re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)")
        others = [m for m in sorted(known) if m != name and (m.endswith(name) or (m in adapted and inside.match(m)))]
        wrong += [f"{name!r} is found in {others[0]!r} too"] if others else []
    if wrong:
        raise ManifestError(
            f"PEFT takes modules to save by the ends of their names, so{listing(wrong)}\nPut the model inside another "
            "module (NameMap.inside), or leave these arrays frozen."
        )


def unpack_full(reading: Reading) -> dict[str, Weight]:
    """Returns the arrays that stand in a file themselves, by path.

    Raises:
      ManifestError: a tensor is misshapen, or a base weight in the file is not that of the tree.
    """
    for (module, tensor), array in (reading.found.whole | reading.found.base).items():
        place = reading.index[module, tensor][0]
        check_shapes(module, {tensor: array}, {tensor: whole_shape(place)}, place)
        if place.rule.shared and (module, tensor) in reading.found.whole:
            raise ManifestError(
                f"module {module!r}: the model reads {place.path} in other places too, where PEFT leaves it as it was. "
                "Untie the two in the parameters first."
            )
    for (module, tensor), array in reading.found.base.items():
        place, position = reading.index[module, tensor]
        ours = whole_to_torch(unstack(reading.base.leaves[place.path], place, place.path)[position], place)
        if not np.array_equal(np.asarray(ours, np.float32), np.asarray(array, np.float32)):
            raise ManifestError(
                f"module {module!r}: the file holds its base weight too, with other numbers than {place.path}. Put "
                "these into the parameters first: the adapter was trained on them."
            )
    weights: dict[str, Weight] = {}
    for place, layers in whole_per_leaf(reading.found.whole, reading.index).items():
        same_of_all(dict(zip(place.modules, (part.dtype for part in layers), strict=True)), "dtype", "a stack has one.")
        array = reading.base.leaves[place.path]
        value = stack([whole_from_torch(part, place) for part in layers], place)
        weights[place.path] = Full(
            value=jnp.asarray(value, array.dtype),
            **reading.fields(place),
            trainable=("value",),
            method="full",
        )
    return weights
