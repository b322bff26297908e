"""Which entries a lottery ticket holds: those that full fine-tuning changed most, of all arrays together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from subspace_jax.core import Params, PatternError, RankError, StructureError, check_int, leaves_with_paths, matches
from subspace_jax.core import nearest as nearest_paths
from subspace_jax.weights import largest_of_all


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The entries that sparse fine-tuning trains.

    Attributes:
      chosen: by path, bool of the array's shape.
      ties: entries beside the chosen ones that changed as much as the one that changed least of them; which of them
        were taken is decided by the order of the arrays and of their entries.
    """

    chosen: Mapping[str, np.ndarray]
    ties: int = 0

    @property
    def count(self) -> int:
        r"""\(K\), the number of chosen entries."""
        return sum(int(mask.sum()) for mask in self.chosen.values())

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the arrays, as the selector of a rule."""
        return tuple(self.chosen)


def select_changed(
    before: Params,
    after: Params,
    count: int,
    *,
    maskable: str | Sequence[str] = "**",
    already: Selection | None = None,
) -> Selection:
    r"""Chooses the entries that changed most, \(|\theta_1 - \theta_s|\), exactly \(K\) of all arrays together.

    One ranking for all arrays: those that change more give more entries. Changes are taken in float32, so train
    masters of that precision where the model's own are less.

    Args:
      before: \(\theta_s\), a tree of arrays.
      after: \(\theta_1\), a tree of the same paths.
      count: \(K\), further entries where some were chosen already.
      maskable: globs of the arrays that may be masked. Published: all but layer norms, the output embedding, which is
        untied from the input's, and the task's head.
      already: entries that were chosen before; they stay.

    Returns:
      The entries of every array that may be masked, those chosen before included.

    Raises:
      RankError: `count` is no integer or negative, or there are fewer entries to choose from.
      PatternError: a glob matches nothing.
      StructureError: an array of `before` is not in `after` with the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> before = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> after = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([0.0, -2.0])}
      >>> {path: mask.tolist() for path, mask in select_changed(before, after, 2).chosen.items()}
      {'a': [True, False], 'b': [False, True]}
    """
    count = check_int("composable_sft: count", count, least=0)
    start, end = maskable_arrays(before, maskable), dict(leaves_with_paths(after))
    changes = {}
    for path, array in start.items():
        if path not in end or end[path].shape != array.shape:
            raise StructureError(
                f"{path}: select_changed: of shape {array.shape} before and "
                f"{end[path].shape if path in end else 'missing'} after; nearest are {nearest_paths(path, end)}."
            )
        changes[path] = np.abs(np.asarray(end[path], np.float32) - np.asarray(array, np.float32))
    return choose(changes, count, already)


def select_random(params: Params, count: int, *, key: jax.Array, maskable: str | Sequence[str] = "**") -> Selection:
    """Chooses random entries, the control that the paper compares with.

    Args:
      params: a tree of arrays.
      count: how many.
      key: a random key; consumed.
      maskable: globs of the arrays that may be masked.

    Returns:
      The entries of every array that may be masked.

    Raises:
      RankError: `count` is no integer or negative, or there are fewer entries to choose from.
      PatternError: a glob matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> select_random({"w": jnp.ones((3, 4))}, 5, key=jax.random.key(0)).count
      5
    """
    arrays = maskable_arrays(params, maskable)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), np.uint32)))
    return choose({path: rng.random(v.shape) for path, v in arrays.items()}, check_int("count", count, least=0))


def choose(scores: Mapping[str, np.ndarray], count: int, already: Selection | None = None) -> Selection:
    """The entries of largest scores that were not chosen before, with those that were."""
    held = already.chosen if already is not None else {}
    open_ = {p: np.where(held[p], -1.0, s) if p in held else s for p, s in scores.items()}
    room = sum(int((s >= 0).sum()) for s in open_.values())
    if count > room:
        raise RankError(f"composable_sft: count={count}: {room} entries are left to choose from.")
    found = largest_of_all(open_, count)
    least = min((float(open_[p][m].min()) for p, m in found.items() if m.any()), default=0.0)
    equal = sum(int((s == least).sum()) for s in open_.values()) if count else 0
    ties = equal - sum(int((open_[p][m] == least).sum()) for p, m in found.items())
    return Selection({p: m | held[p] if p in held else m for p, m in found.items()}, ties)


def maskable_arrays(params: Params, maskable: str | Sequence[str]) -> dict[str, Any]:
    """The arrays of a tree that globs match, by path."""
    globs = (maskable,) if isinstance(maskable, str) else tuple(maskable)
    leaves = leaves_with_paths(params)
    for glob in globs:
        if not any(matches(glob, path) for path, _ in leaves):
            raise PatternError(
                f"composable_sft: maskable={glob!r} matches no array; nearest are "
                f"{nearest_paths(glob.replace('**/', ''), [path for path, _ in leaves])}."
            )
    return {path: v for path, v in leaves if any(matches(glob, path) for glob in globs)}
