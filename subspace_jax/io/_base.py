"""Base arrays that a file leaves out, because the caller has them: identified by hashes of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from subspace_jax.core import Params, Weight, is_weight, leaves_with_paths
from subspace_jax.io._array import ArraySpec, array_spec, on_host, to_stored
from subspace_jax.io._errors import ManifestError


class Changes(NamedTuple):
    """In which entries an array differs from another.

    Attributes:
      positions: of those entries in the flat array, ascending, `[k]`, int32 or int64.
      values: what they are, `[k]`.
    """

    positions: np.ndarray
    values: np.ndarray


class BaseArrays:
    """The arrays of the original parameters by path, with the hash of each, computed once when first asked for.

    Made of None it holds nothing, so that nothing is left out.
    """

    def __init__(self, params: Params, *, sparse: bool = False) -> None:
        """Takes the leaves of a tree.

        Args:
          params: the original parameters; weights that only store arrays, such as packed blocks, may be among them.
          sparse: store only the changed entries of arrays that differ from their leaf in few of them.
        """
        self.leaves: dict[str, Any] = dict(leaves_with_paths(params))
        self._parts: dict[str, Any] = {}
        self._sparse = sparse
        self._digests: dict[str, str] = {}
        for path, leaf in self.leaves.items():
            if is_weight(leaf) and leaf.stored:
                self._parts |= {f"{path}/{name}": value for name, value in leaf.data_items()}
            elif is_weight(leaf):
                raise ManifestError(
                    f"{path}: the base tree holds a {type(leaf).__name__}; base= takes the original parameters, as "
                    "they were before adapt()."
                )
            if not hasattr(leaf, "dtype"):
                raise ManifestError(f"{path}: the base tree holds a {type(leaf).__name__}, expected an array.")

    def array(self, path: str) -> Any:
        """Returns the array at `path`, or that part of a weight which only stores an array; None if there is none."""
        leaf = self.leaves.get(path)
        return self._parts.get(path) if leaf is None or is_weight(leaf) else leaf

    def holds(self, path: str, value: Any) -> bool:
        """Tells whether the leaf at `path` has the shape, dtype and bytes of `value`."""
        leaf = self.array(path)
        if leaf is None or leaf.shape != value.shape or leaf.dtype != value.dtype:
            return False
        return leaf is value or np.array_equal(_bytes(leaf, path), _bytes(value, path))

    def changes(self, path: str, value: Any) -> Changes | None:
        """Returns what changes the leaf at `path` into `value`; None if that takes over half the bytes of `value`."""
        leaf = self.array(path)
        if not self._sparse or leaf is None or leaf.shape != value.shape or leaf.dtype != value.dtype:
            return None
        spec = array_spec(value, path)
        if spec.key or spec.weak or spec.stored_dtype != spec.dtype:
            return None
        old, new = (_bytes(v, path).reshape(-1, spec.dtype.itemsize) for v in (leaf, value))
        positions = np.flatnonzero((old != new).any(axis=1))
        positions = positions.astype(np.int32 if len(new) < 2**31 else np.int64)
        if 2 * len(positions) * (positions.itemsize + spec.dtype.itemsize) > new.size:
            return None
        return Changes(positions, new[positions].reshape(-1).view(spec.dtype))

    def digest(self, path: str) -> str:
        """Returns the SHA-256 of the bytes of one leaf, of a part of it, or of all parts of a stored weight."""
        if path not in self._digests:
            leaf = self.leaves.get(path)
            if isinstance(leaf, Weight):
                parts = "".join(self.digest(f"{path}/{name}") for name, _ in leaf.data_items())
                self._digests[path] = hashlib.sha256(parts.encode()).hexdigest()
            else:
                self._digests[path] = digest(self.array(path), path)
        return self._digests[path]

    def check(self, references: Iterable[tuple[str, ArraySpec, str]], *, verify: bool = True) -> list[str]:
        """Compares leaves with what was recorded of them.

        Args:
          references: path, spec and hash of each leaf that a file refers to.
          verify: compare hashes too, which reads every array once.

        Returns:
          One line for each leaf that is missing or differs.
        """
        wrong = []
        for path, spec, recorded in references:
            leaf = self.array(path)
            if leaf is None:
                wrong.append(f"{path!r} is missing from the base tree, expected {spec}")
                continue
            found = array_spec(leaf, path)
            if (found.shape, found.dtype, found.key) != (spec.shape, spec.dtype, spec.key):
                wrong.append(f"{path!r} is {found} in the base tree, expected {spec}")
            elif verify and self.digest(path) != recorded:
                wrong.append(f"{path!r} has other numbers in the base tree than when this was saved")
        return wrong


def digest(value: Any, where: str) -> str:
    """Returns the SHA-256 of an array's bytes as hexadecimal digits."""
    return hashlib.sha256(_bytes(value, where).data).hexdigest()


def _bytes(value: Any, where: str) -> np.ndarray:
    spec = array_spec(value, where)
    return on_host(to_stored(value, spec), where).reshape(-1).view(np.uint8)
