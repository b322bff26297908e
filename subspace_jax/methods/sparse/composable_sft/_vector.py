"""Sparse vectors of tasks and languages: taken from trained trees, added to a model, and coded by gaps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, StructureError, is_weight, leaves_with_paths, map_with_paths, nearest
from subspace_jax.weights import SparseDelta


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    r"""A sparse difference \(\phi\) and, of a task, its head.

    Attributes:
      entries: by path, positions in the array read in its own order (row major), int64 ascending, and values.
      shapes: by path, the array's shape.
      head: by path, arrays that learned as a whole.
    """

    entries: Mapping[str, tuple[np.ndarray, np.ndarray]]
    shapes: Mapping[str, tuple[int, ...]]
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of entries, the head left out."""
        return sum(len(positions) for positions, _ in self.entries.values())

    def __neg__(self) -> Vector:
        """Returns the vector that takes this one away; it has no head."""
        return Vector({p: (at, -v) for p, (at, v) in self.entries.items()}, self.shapes)


def vector_of(adapted: Params, *, least: float = 1e-7) -> Vector:
    """Takes the vector out of a trained tree: what was added where, and whole arrays that learned as the head.

    Args:
      adapted: a tree with weights of `composable_sft` and, for a head, of `full`.
      least: additions up to this size are dropped, as published.

    Returns:
      The vector, its values in float32, with its head.

    Raises:
      StructureError: the tree has no additions.
      RoleError: what learns beside the additions is a module on activations, which is no array.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> sft = sj.methods.composable_sft
      >>> chosen = sft.Selection({"w": jnp.array([True, False, True])})
      >>> adapted = sj.adapt({"w": jnp.zeros(3)}, {"w": sft.composable_sft(chosen)}, key=jax.random.key(0))
      >>> moved = jax.tree.map(lambda v: v + 1.0, sj.partition(adapted)[0])
      >>> found = vector_of(sj.combine(moved, sj.partition(adapted)[1]))
      >>> found.entries["w"][0].tolist(), found.count
      ([0, 2], 2)
    """
    entries, shapes, head = {}, {}, {}
    for path, weight in leaves_with_paths(adapted):
        if isinstance(weight, SparseDelta) and weight.mode == "add":
            zeros = dataclasses.replace(weight, base=jnp.zeros(weight.shape, jnp.float32))
            added = np.ravel(np.asarray(zeros.materialize(jnp.float32)))
            at = np.flatnonzero(np.abs(added) > least)
            entries[path], shapes[path] = (at, added[at]), weight.shape
        elif is_weight(weight) and weight.trainable:
            head[path] = weight.materialize()
    if not entries:
        raise StructureError("vector_of: the tree has no additions to entries; pass what composable_sft made.")
    return Vector(entries, shapes, head)


def compose(params: Params, *vectors: Vector) -> Params:
    r"""Adds vectors to a tree: \(\theta_0 + (\phi_T + \phi_{L'})\), and the first vector's head, if it has one.

    Entries that several vectors have are added up. The sum is made anew from the arrays given, which stay: adding and
    taking away in place, as the released program does, lets rounding grow. Give the task first: the head of a
    language's own training is ignored.

    Args:
      params: a tree of arrays, \(\theta_0\); of leaves in a head, the vector's are taken.
      vectors: of `vector_of`; `-vector` takes one away.

    Returns:
      A tree like the given one, of the arrays' dtypes; those of a head as the vector has them.

    Raises:
      StructureError: a vector has an array that the tree has not, or of another shape.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> one = Vector({"w": (np.array([0, 2]), np.array([1.0, 2.0]))}, {"w": (3,)})
      >>> two = Vector({"w": (np.array([2]), np.array([0.5]))}, {"w": (3,)})
      >>> compose({"w": jnp.zeros(3)}, one, two)["w"].tolist()
      [1.0, 0.0, 2.5]
    """
    known = dict(leaves_with_paths(params))
    for vector in vectors:
        for path, shape in vector.shapes.items():
            if path not in known or tuple(known[path].shape) != tuple(shape):
                raise StructureError(
                    f"{path}: compose: the vector is of an array of shape {tuple(shape)}, the tree has "
                    f"{tuple(known[path].shape) if path in known else 'none'}; nearest are {nearest(path, known)}."
                )
    head = vectors[0].head if vectors else {}

    def one(path: str, array: Any) -> Any:
        if path in head:
            return jnp.asarray(head[path])
        parts = [v.entries[path] for v in vectors if path in v.entries]
        if not parts:
            return array
        wide = np.float64 if array.dtype == jnp.float64 else np.float32
        total = np.zeros(array.size, wide)
        for at, values in parts:
            total[at] += values.astype(wide)
        touched = np.unique(np.concatenate([at for at, _ in parts]))
        if not getattr(array, "is_fully_addressable", True):
            flat = jnp.ravel(array)
            summed = (flat[touched].astype(wide) + total[touched]).astype(array.dtype)
            return flat.at[touched].set(summed).reshape(array.shape)
        host = np.array(array).ravel()  # a copy: on a device every support would be a program of its own
        host[touched] = (host[touched].astype(wide) + total[touched]).astype(host.dtype)
        return jax.device_put(host.reshape(array.shape), getattr(array, "sharding", None))

    return map_with_paths(one, params)


def encode_gaps(positions: np.ndarray) -> np.ndarray:
    """Codes ascending positions as gaps of seven bits a byte, the highest bit set where a gap goes on.

    Of any array's entries, also where there are more than an int32 can count. Where one in fifty entries is chosen,
    nearly all gaps take one byte, an eighth of an int64.

    Args:
      positions: ascending integers, none negative.

    Returns:
      uint8 `[bytes]`.

    Raises:
      ValueError: they do not ascend.

    Example:
      >>> import numpy as np
      >>> encode_gaps(np.array([3, 4, 300])).tolist(), decode_gaps(encode_gaps(np.array([3, 4, 300]))).tolist()
      ([3, 0, 167, 2], [3, 4, 300])
    """
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions[0] < 0 or np.any(np.diff(positions) <= 0)):
        raise ValueError("encode_gaps: positions must ascend from 0 on, none twice.")
    gaps = np.diff(positions, prepend=-1) - 1
    lengths = np.ones(len(gaps), np.int64)
    for bits in range(7, 63, 7):
        lengths += gaps >= (1 << bits)
    ends = np.cumsum(lengths)
    coded = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        value = (gaps[has] >> (7 * place)) & 127
        goes_on = lengths[has] > place + 1
        coded[ends[has] - lengths[has] + place] = value | np.where(goes_on, 128, 0)
    return coded


def decode_gaps(coded: np.ndarray) -> np.ndarray:
    """Returns the positions, int64, that `encode_gaps` coded.

    Raises:
      ValueError: the last gap is cut off.
    """
    coded = np.asarray(coded, np.uint8)
    if not coded.size:
        return np.zeros(0, np.int64)
    if coded[-1] >= 128:
        raise ValueError("decode_gaps: the last gap goes on after the end; the bytes are cut off.")
    ends = np.flatnonzero(coded < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(coded.size) - np.repeat(starts, ends - starts + 1)
    parts = (coded.astype(np.int64) & 127) << (7 * places)
    return np.cumsum(np.add.reduceat(parts, starts) + 1) - 1
