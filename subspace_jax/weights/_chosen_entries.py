"""Lists of positions of entries that were chosen on the host, where their number follows from values."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Role, SubspaceError, is_tracer
from subspace_jax.weights._entries import flat_entries


def positions_of(chosen: np.ndarray) -> np.ndarray:
    """Returns the positions of True, one list per layer, padded to the longest.

    Args:
      chosen: `[*stack, S]` bool.

    Returns:
      `[*stack, k]` int32, ascending; the padding is S.

    Example:
      >>> import numpy as np
      >>> positions_of(np.array([[True, False, True], [False, True, False]])).tolist()
      [[0, 2], [1, 3]]
    """
    size = chosen.shape[-1]
    rows = chosen.reshape(-1, size)
    longest = int(rows.sum(axis=-1).max(initial=0))
    found = np.full((len(rows), longest), size, np.int32)
    for row, mask in zip(found, rows, strict=True):
        places = np.flatnonzero(mask)
        row[: len(places)] = places
    return found.reshape(*chosen.shape[:-1], longest)


def entries_on_host(array: jax.Array, role: Role) -> np.ndarray:
    """Returns the entries of every layer, `[*stack, S]` float32 or wider, in the order that positions count.

    Raises:
      SubspaceError: the array is traced or abstract: how many entries are chosen follows from its values, and shapes
        may not follow from what is not there yet.
    """
    if is_tracer(array) or isinstance(array, jax.ShapeDtypeStruct):
        raise SubspaceError(
            "how many entries learn follows from values, which are abstract here; call adapt() outside of jit and "
            "eval_shape."
        )
    flat = flat_entries(jnp.asarray(array), role)
    return np.asarray(flat.astype(jnp.promote_types(flat.dtype, jnp.float32)))


def largest_of_all(scores: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Returns which entries of several arrays are the `count` largest of all together.

    Of equal ones those of the array that comes first in order, then those at lower positions.

    Args:
      scores: by path, any shapes, none negative.
      count: at most the number of all scores.

    Returns:
      By path, bool arrays of the same shapes with `count` True in all.

    Raises:
      ValueError: `count` is negative or above the number of scores.

    Example:
      >>> import numpy as np
      >>> found = largest_of_all({"a": np.array([3.0, 1.0]), "b": np.array([1.0, 2.0])}, 3)
      >>> found["a"].tolist(), found["b"].tolist()
      ([True, True], [False, True])
    """
    flat = np.concatenate([np.ravel(v) for v in scores.values()]) if scores else np.zeros(0)
    if not 0 <= count <= flat.size:
        raise ValueError(f"largest_of_all: count={count} of {flat.size} scores; expected at least 0 and at most all.")
    taken = np.zeros(flat.size, bool)
    if count:
        last = np.partition(flat, flat.size - count)[flat.size - count]
        taken = flat > last
        taken[np.flatnonzero(flat == last)[: count - int(taken.sum())]] = True
    ends = np.cumsum([v.size for v in scores.values()])[:-1]
    return {path: part.reshape(v.shape) for (path, v), part in zip(scores.items(), np.split(taken, ends), strict=True)}
