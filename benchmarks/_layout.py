"""How a Llama's matrices are split over a mesh of two axes, what that leaves on a device, and what moves of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from benchmarks._collectives import Operation
from subspace_jax.core import leaves_with_paths, matches

# Each frozen matrix is split over both axes of the mesh: fully sharded over "data", by heads and hidden units over
# "model".
SPECS = {
    "embedding/embedding": P("model", "data"),
    "**/attention/output/kernel": P(None, "model", None, "data"),
    "**/attention/*/kernel": P(None, "data", "model", None),
    "**/mlp/down/kernel": P(None, "model", "data"),
    "**/mlp/*/kernel": P(None, "data", "model"),
    "head/kernel": P("data", "model"),
    "**": P(),
}


def spec(path: str) -> P:
    """Returns how the array at a path is split."""
    return next(found for pattern, found in SPECS.items() if matches(pattern, path))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Returns shapes that say where their arrays lie."""
    return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)


def held_bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    return sum(math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize for v in jax.tree.leaves(tree))


def weight_shapes(params: Any) -> set[tuple[int, ...]]:
    """Returns the shapes that a gathered matrix of the base can have on a device: split over one axis, or whole.

    Sorted sizes above one, since the compiler transposes and joins axes.
    """
    found = set()
    for path, leaf in leaves_with_paths(params):
        if not path.endswith(("kernel", "embedding")):
            continue
        sizes = [(n, entry) for n, entry in zip(leaf.shape, spec(path), strict=True) if entry is not None or n > 1]
        if "layers" in path:
            sizes = sizes[1:]
        split = [i for i, (_, entry) in enumerate(sizes) if entry]
        mesh = jax.sharding.get_mesh().shape
        for count in range(len(split)):
            for kept in itertools.combinations(split, count):
                dims = [n // mesh[entry] if i in kept else n for i, (n, entry) in enumerate(sizes)]
                joined = [dims] if len(dims) == 2 else [dims, _join(sizes, dims)]
                found |= {tuple(sorted(n for n in one if n > 1)) for one in joined}
    return found


def _join(sizes: Sequence[tuple[int, Any]], dims: Sequence[int]) -> list[int]:
    """Heads and their size as one axis."""
    heads = 1 if sizes[-1][1] is None else 0
    return [*dims[:heads], dims[heads] * dims[heads + 1], *dims[heads + 2 :]]


def of_weights(found: Iterable[tuple[Operation, int]], shapes: set[tuple[int, ...]]) -> list[tuple[Operation, int]]:
    """Returns those results of collectives that are a matrix of the base, or more of one than a device holds."""
    kept = []
    for operation, times in found:
        results = tuple(one for one in operation.shapes if tuple(sorted(n for n in one[1] if n > 1)) in shapes)
        if results:
            kept.append((dataclasses.replace(operation, shapes=results), times))
    return kept
