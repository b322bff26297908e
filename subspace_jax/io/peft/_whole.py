"""Whole parameter trees by PyTorch's names: out as tensors, and in from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from subspace_jax.core import is_weight, leaves_with_paths, map_with_paths
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io.peft._layout import stack, unstack, whole_from_torch, whole_shape, whole_to_torch
from subspace_jax.io.peft._names import NameMap, TensorPlace, require_places


def export_tensors(params: Any, names: NameMap) -> dict[str, np.ndarray]:
    """Returns plain parameters as tensors by their names in PyTorch.

    Args:
      params: a tree of arrays, merged where it was adapted.
      names: what the modules are called there.

    Returns:
      Every tensor, in PyTorch's layout; stacked layers are taken apart.

    Raises:
      ManifestError: a leaf is a stand-in weight, or has no name.

    Example:
      >>> import jax.numpy as jnp
      >>> from subspace_jax.io import NameMap, NameRule
      >>> tensors = export_tensors({"fc": {"kernel": jnp.ones((3, 2))}}, NameMap((NameRule("fc", "net.fc"),)))
      >>> {name: tensor.shape for name, tensor in tensors.items()}
      {'net.fc.weight': (2, 3)}
    """
    leaves = dict(leaves_with_paths(params))
    adapted = [path for path, leaf in leaves.items() if is_weight(leaf)]
    if adapted:
        raise ManifestError(f"stand-in weights have no tensor of their own; merge() the tree first:{listing(adapted)}")
    places = names.places(leaves)
    require_places(leaves, places, names)
    return {
        tensor_name(place, index): np.ascontiguousarray(whole_to_torch(part, place))
        for path, place in places.items()
        for index, part in enumerate(unstack(leaves[path], place, path))
    }


def import_tensors(
    read: Callable[[str], np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    like: Any,
    names: NameMap,
    *,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> tuple[Any, set[str]]:
    """Builds a parameter tree from tensors by their names in PyTorch, one leaf in memory at a time.

    Args:
      read: returns a tensor by its name.
      shapes: of all tensors that there are.
      like: the tree, of arrays or `jax.ShapeDtypeStruct`.
      names: what its modules are called there.
      place: called with the path and the array of each leaf; what it returns stands in the tree. It may cast and put
        the array on devices.

    Returns:
      The tree, and the names of the tensors that were used.

    Raises:
      ManifestError: a leaf has no name, or a tensor is missing or of another shape; all of them are named.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from subspace_jax.io import NameMap, NameRule
      >>> tensors = {"net.fc.weight": np.ones((2, 3), np.float32)}
      >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
      >>> shapes = {name: tensor.shape for name, tensor in tensors.items()}
      >>> params, used = import_tensors(tensors.__getitem__, shapes, like, NameMap((NameRule("fc", "net.fc"),)))
      >>> params["fc"]["kernel"].shape, used
      ((3, 2), {'net.fc.weight'})
    """
    leaves = dict(leaves_with_paths(like))
    places = names.places(leaves)
    require_places(leaves, places, names)
    wanted = {tensor_name(p, i): whole_shape(p) for p in places.values() for i in range(len(p.modules))}
    wrong = [
        f"{name}: {'missing' if name not in shapes else f'shape {tuple(shapes[name])}'}, expected {shape}"
        for name, shape in wanted.items()
        if tuple(shapes.get(name, ())) != shape or name not in shapes
    ]
    if wrong:
        raise ManifestError(f"{len(wrong)} of {len(wanted)} tensors do not fit this model:{listing(wrong)}")

    def leaf(path: str, _: Any) -> Any:
        spot = places[path]
        parts = [whole_from_torch(read(tensor_name(spot, i)), spot) for i in range(len(spot.modules))]
        return place(path, stack(parts, spot) if spot.depth else parts[0])

    return map_with_paths(leaf, like), set(wanted)


def tensor_name(place: TensorPlace, index: int) -> str:
    """Returns the name of a tensor of one of the place's modules."""
    module = place.modules[index]
    return f"{module}.{place.tensor}" if place.tensor else module
